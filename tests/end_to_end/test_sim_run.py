"""GRPO on a device that is neither the CPU nor a GPU: the run is that of the CPU, to rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_hf_model

from grpo_conformance.sim import build as building
from grpo_core.cli.main import main

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
BAND = 1e-3
"""Relative to max(1, the CPU's value). Both compute in float32; kernels that add in another order differ by
about 1e-7 a step, which AdamW's division by small second moments can raise a thousandfold in three steps."""
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Every head dim a multiple of 16, as the device wants it.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 16},
    "deepseek_v3": {
        "q_lora_rank": 20, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16,
    },
    "qwen3_next": {"head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    building.build(Path.home() / building.CACHE)


def on_sim(*words: str, rc: int = 0) -> str:
    """A command in a process of its own: torch takes new device types before its first backward only."""
    command = [sys.executable, "-m", "grpo_core.cli.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_close(sim: Path, cpu: Path, steps: int) -> None:
    got, wanted = rows(sim), rows(cpu)
    assert len(got) == len(wanted) == steps
    for step, (ours, theirs) in enumerate(zip(got, wanted, strict=True), 1):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.startswith(("time/", "throughput/", "memory/")):
                continue
            assert abs(ours[name] - value) <= BAND * max(1.0, abs(value)), (step, name, ours[name], value)
    assert got[0]["policy/grad_norm"] > 0


def both(recipe: Path, tmp_path: Path, *words: str) -> tuple[Path, Path]:
    sim, cpu = tmp_path / "sim", tmp_path / "cpu"
    shared = [str(recipe), "train.steps=3", "run.save_every=0", *words]
    on_sim("train", *shared, "device=sim", f"run.dir={sim}")
    assert main(["train", *shared, f"run.dir={cpu}"]) == 0
    return sim, cpu


def write_family(family: str, folder: Path, tokenizer: Path, **sizes: Any) -> None:
    """A tiny random model of a family with the tokenizer of another folder."""
    vocab = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    ids = {"vocab_size": len(vocab), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    tiny_hf_model(family, **ids, **sizes, max_position_embeddings=128).save_pretrained(folder)
    for name in FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)


def test_three_steps_on_sim_follow_the_cpu(tiny_recipe: Path, tmp_path: Path) -> None:
    settings = ["algo.mini_batches=2", "algo.kl_coef=0.01", "rollout.top_p=0.9", "rollout.min_tokens=2"]
    sim, cpu = both(tiny_recipe, tmp_path, *settings)
    assert_close(sim, cpu, 3)
    plan = json.loads((sim / "plan.json").read_text())
    ops = {row["op"]: row["chosen"] for row in plan["choices"] if row["chosen"]}
    assert plan["device"]["type"] == "sim"
    assert {chosen for op, chosen in ops.items() if not op.startswith("engine.")} == {"sim:plain"}
    # The device's own peak: some MB of a tiny model, not the process's hundreds.
    assert 0 < rows(sim)[-1]["memory/peak_gb"] < 0.05 < rows(cpu)[-1]["memory/peak_gb"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_other_families_follow_the_cpu(
    family: str, tiny_recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    write_family(family, tmp_path / "model", tiny_model, **FAMILIES[family])
    assert_close(*both(tiny_recipe, tmp_path, f"model={tmp_path}/model"), 3)


def test_a_run_on_sim_resumes_where_it_was(tiny_recipe: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    shared = [str(tiny_recipe), "device=sim", "train.steps=4", "run.keep=4", "rollout.temperature=0.8"]
    on_sim("train", *shared, f"run.dir={whole}")
    on_sim("train", *shared, f"run.dir={cut}")
    for step in (3, 4):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:08d}")
    on_sim("train", "--resume", str(cut))
    last = Path("checkpoints") / "step-00000004" / "model.safetensors"
    assert (cut / last).read_bytes() == (whole / last).read_bytes()
    assert_close(cut, whole, 4)


def test_a_head_dim_the_device_lacks_is_told_before_anything_runs(
    tiny_recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    write_family("qwen3", folder, tiny_model)
    said = on_sim("plan", str(tiny_recipe), "device=sim", f"model={folder}", rc=2)
    assert "head_dim=10" in said and "fallback: reference" in said and "Traceback" not in said
    # With the line that the error names, the reference serves what the device does not.
    on_sim(
        "train", str(tiny_recipe), "device=sim", f"model={folder}", "train.steps=1", "fallback=reference",
        f"run.dir={tmp_path}/fallback",
    )  # fmt: skip
    assert len(rows(tmp_path / "fallback")) == 1
