"""The arithmetic of the benchmark scripts, and that they still run against the product."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name, as they do when one is started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_of(step: float, peak: float, *, prompt_tokens: float = 94.0) -> dict[str, Any]:
    phases = {
        "rollout": step / 2,
        "reward": 0.0,
        "logprob": 0.0,
        "train": step / 2,
        "sync": 0.0,
        "other": 0.0,
    }
    return {
        "step_s": step, "steps_s": [step, step], "peak_rss_bytes": peak * 2**30, "phases_s": phases,
        "prompt_tokens": prompt_tokens, "completion_tokens": 128,
    }  # fmt: skip


def test_the_fastest_peer_is_the_one_that_counts() -> None:
    from compare import summary

    records = {
        "grpo-core": [run_of(2.0, 1.0), run_of(4.0, 1.0), run_of(2.0, 1.0)],
        "trl a": [run_of(9.0, 2.0)] * 3,
        "trl b": [run_of(6.0, 3.0)] * 3,
    }
    result = summary(records)
    assert result["best_peer"] == "trl b"
    assert result["time_ratio"] == pytest.approx(3.0)  # 6 over the median 2, not over the mean
    assert result["memory_ratio"] == pytest.approx(3.0)
    assert (result["leanest_peer"], result["memory_ratio_leanest"]) == ("trl a", pytest.approx(2.0))


def test_contenders_that_got_other_prompts_are_not_compared() -> None:
    from compare import check_same_work

    check_same_work({"grpo-core": [run_of(1, 1)], "trl": [run_of(1, 1)]})
    with pytest.raises(RuntimeError, match="different work"):
        check_same_work({"grpo-core": [run_of(1, 1)], "trl": [run_of(1, 1, prompt_tokens=95.0)]})


def test_results_name_no_folder_of_the_machine() -> None:
    from compare import public

    row = {"job": {"model": "/home/someone/model", "data": "/home/someone/x.jsonl"}, "step_s": 1.0}
    assert "someone" not in json.dumps(public({"grpo-core": [row]}))


def test_exponent_of_a_power_law_is_its_power() -> None:
    from scaling import exponent

    assert exponent([1, 2, 4, 8], [3 * size**1.5 for size in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_bounds_of_a_model_worked_out_by_hand(tmp_path: Path) -> None:
    from limits import floors, matrix_parameters

    config = {
        "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
        "num_hidden_layers": 3, "vocab_size": 10,
    }  # fmt: skip
    # A layer: q 8x8, k and v 8x4 each, out 8x8, gate, up and down 8x16 each.
    layer = 64 + 32 + 32 + 64 + 3 * 128
    assert matrix_parameters(config) == (3 * layer, 80)
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = {
        "job": {"model": str(tmp_path), "dtype": "float32", "completion": 5},
        "completion_tokens": 20, "prompt_tokens": 6.0,
    }  # fmt: skip
    slow_memory = floors(result, {"float32_flops_per_s": 1e12, "copy_bytes_per_s": 100.0})
    assert slow_memory["rollout"] == pytest.approx(5 * (3 * layer + 80) * 4 / 100.0)
    slow_maths = floors(result, {"float32_flops_per_s": 100.0, "copy_bytes_per_s": 1e12})
    assert slow_maths["rollout"] == pytest.approx(2 * (20 * (3 * layer + 80) + 6 * 3 * layer) / 100.0)
    assert slow_maths["train"] == pytest.approx(6 * (26 * 3 * layer + 20 * 80) / 100.0)


def test_peak_memory_is_of_the_process_and_not_of_its_parent() -> None:
    from common import peak_rss

    held = bytearray(64 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    child = subprocess.run(
        [sys.executable, "-c", "from common import peak_rss; print(peak_rss())"],
        cwd=BENCHMARKS, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(child.stdout) < 64 * 2**20 < peak_rss()


def test_last_json_skips_chatter() -> None:
    from common import last_json

    assert last_json('{"a": 1}\nhello\n{"a": 2}\nbye\n') == {"a": 2}
    with pytest.raises(ValueError, match="no JSON"):
        last_json("nothing")


@pytest.mark.slow
def test_compare_runs_our_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "compare.py"), "--workload", "tiny", "--rounds", "2",
            "--steps", "1", "--prompts", "2", "--group", "2", "--completion", "3", "--out", str(tmp_path),
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("tiny-*.json")
    content = json.loads(path.read_text())
    runs = content["records"]["grpo-core"]
    assert len(runs) == 2
    for run in runs:
        assert run["completion_tokens"] == 2 * 2 * 3
        assert run["prompt_tokens"] == 2 * 4
        assert math.isclose(sum(run["phases_s"].values()), run["step_s"], abs_tol=5e-5)
    assert "| grpo-core |" in done.stdout
