"""A run with `consistent: true`: the rollout's log-probs are the trainer's, without a difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_hf_model

from grpo_core.cli.main import main

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def write_family(family: str, folder: Path, tokenizer: Path) -> Path:
    """A tiny random model of a family with the tokenizer of another folder."""
    vocab = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    ids = {"vocab_size": len(vocab), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    tiny_hf_model(family, **ids, max_position_embeddings=128).save_pretrained(folder)
    for name in FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", ["train.dtype=bfloat16", "train.micro_tokens=40", "train.recompute=true"]),
        ("qwen3_moe", ["train.dtype=float32", "train.share_prompt=false", "rollout.temperature=0.8"]),
        ("deepseek_v3", ["train.dtype=bfloat16", "rollout.max_sequences=3"]),
        ("qwen3_next", ["train.dtype=float32", "train.micro_tokens=48", "train.router_dtype=float64"]),
    ],
)
def test_log_probs_have_no_gap(
    family: str, settings: list[str], tiny_recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_family(family, tmp_path / "model", tiny_model)
    run = tmp_path / "run"
    shared = [f"model={folder}", "train.steps=3", "run.save_every=0", "algo.kl_coef=0.01", *settings]
    assert main(["train", str(tiny_recipe), "consistent=true", *shared]) == 0
    steps = rows(run)
    assert len(steps) == 3
    for row in steps:
        assert row["mismatch/logprob_gap_max"] == 0.0 and row["mismatch/ratio_mean"] == 1.0
        assert row.get("mismatch/routing_changed", 0.0) == 0.0
    assert steps[0]["policy/grad_norm"] > 0, "nothing was learned"
    plan = json.loads((run / "plan.json").read_text())
    passed = [item for row in plan["choices"] for item in row["passed"]]
    assert any(item["reason"] == "does not offer batch_invariant" for item in passed)
