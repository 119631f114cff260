"""The family benchmark gives both sides the same work, and runs for every family."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_tokens_are_those_of_all_sequences() -> None:
    from family_work import even_work, grpo_work

    assert even_work(3, 10).tokens == 30 and not even_work(3, 10).shared
    work = grpo_work(2, 4, 6, 8)
    assert work.shared and len(work.sequences) == 8
    assert work.tokens == 8 * 6 + sum(len(ids) for _, ids in work.sequences)
    assert all(2 <= len(ids) <= 8 for _, ids in work.sequences)


@pytest.mark.parametrize("job", ["even", "grpo"])
def test_both_sides_do_the_same_work(job: str, tmp_path: Path) -> None:
    from bench_family import training_work
    from family_models import SIZES, write_model
    from family_work import our_training, their_training

    folder = write_model(tmp_path / "model", "qwen3", SIZES["tiny"])
    work = training_work(job, 256)
    ours = our_training(folder, "float32", work, {})()
    theirs = their_training(folder, "float32", work, {"attn_implementation": "sdpa"})()
    # The mean of some hundred log-probs near ln 4096, each rounded in float32.
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_sides_that_did_different_work_are_not_compared() -> None:
    from bench_family import check_same

    check_same("even", "float32", -8.3178, -8.3177)
    with pytest.raises(RuntimeError, match="different work"):
        check_same("even", "float32", -8.31, -8.29)
    with pytest.raises(RuntimeError, match="different work"):
        check_same("even", "float32", float("nan"), -8.29)


def test_the_fastest_setting_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_family

    seconds = {"slow": 0.02, "fast": 0.001}
    monkeypatch.setattr(bench_family, "timed", lambda run, clock: seconds[run])
    settings = [{"attn": "slow"}, {"attn": "fast"}]
    best, tried = bench_family.fastest(lambda one: one["attn"], settings, time.process_time)
    assert best == {"attn": "fast"} and tried == seconds
    # A setting that is hopeless at first is not tried again.
    best, tried = bench_family.fastest(lambda one: one["attn"], settings[::-1], time.process_time)
    assert best == {"attn": "fast"} and tried == seconds


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2.5", "moonlight", "qwen3-next"])
def test_every_family_and_job_runs(family: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "bench_family.py"), "--size", "tiny", "--families", family,
            "--rounds", "1", "--new", "3", "--tokens", "256", "--threads", "1", "--dtype", "float32",
            "--out", str(tmp_path / "result.json"), "--clock", "cpu",
        ],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["job"] for row in rows] == ["even", "grpo", "decode"]
    assert all(row["ratio"] > 0 and row["their_settings_s"] for row in rows)
    assert f"| {family} | decode |" in done.stdout
