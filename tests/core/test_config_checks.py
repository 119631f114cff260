"""Contradictions between settings."""

from __future__ import annotations

import pytest

from grpo_core.config_loader import parse_config
from grpo_core.errors import ConfigError

BASE = "model: m\ndata: {train: a.jsonl}\nrewards: [{name: exact}]\n"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algo.group_size=1"], "algo.group_size 1 with algo.advantage group_norm"),
        (
            ["algo.group_size=1", "algo.advantage=group_mean"],
            "algo.group_size 1 with algo.advantage group_mean",
        ),
        (["algo.clip_dual=0.5"], "algo.clip_dual 0.5 would cut every update"),
        (["algo.clip_dual=1"], "algo.clip_dual 1 would cut every update"),
        (["algo.mini_batches=9"], "algo.mini_batches 9 is more than the 8 groups"),
        (
            ["rollout.min_tokens=9", "rollout.max_tokens=8"],
            "rollout.min_tokens 9 is above rollout.max_tokens 8",
        ),
        (["rollout.temperature=0"], "rollout.temperature 0 makes all 8 completions"),
        (["eval.every=5"], "data.eval is empty"),
        (["rewards.0.weight=0"], "every reward has weight 0"),
        (["run.dir=runs/{step}"], "run.dir knows {name} and {time}, not {step}"),
        (["run.dir='runs/{name'"], "run.dir 'runs/{name' is not a pattern"),
    ],
)
def test_contradictions_are_errors(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(BASE, "run.yaml", overrides)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.group_size=1", "algo.advantage=mine"],
        ["algo.clip_dual=1.5"],
        ["algo.mini_batches=8"],
        ["rollout.min_tokens=8", "rollout.max_tokens=8"],
        ["rollout.temperature=0", "algo.group_size=1", "algo.advantage=mine"],
        ["eval.every=5", "data.eval=b.jsonl"],
        ["run.dir='runs/{name}-{time}'"],
        ["train.warmup_steps=99"],
        ["train.steps=10", "train.warmup_steps=15", "algo.mini_batches=2"],
    ],
)
def test_neighbours_of_contradictions_are_fine(overrides: list[str]) -> None:
    assert parse_config(BASE, "run.yaml", overrides).warnings == ()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.top_p=0.9", "command line  rollout.top_p filters"),
        ("rollout.top_k=5", "command line  rollout.top_k filters"),
        ("rollout.min_p=0.1", "command line  rollout.min_p filters"),
        ("train.warmup_steps=100", "the learning rate never reaches train.lr"),
        ("train.min_lr_ratio=0.1", "has no effect with train.schedule constant"),
        ("train.lr=0.1", "train.lr 0.1 is far above"),
        ("algo.clip_low=1", "this clips nothing"),
        ("data.eval=b.jsonl", "it is never evaluated"),
        ("algo.epochs=8", "algo.epochs 8"),
        ("train.routing_replay=R2", "which a step of one update"),
    ],
)
def test_traps_are_warnings(override: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    warnings = parse_config(BASE, "run.yaml", [override]).warnings
    assert len(warnings) == 1
    assert told in warnings[0]
    assert capsys.readouterr() == ("", "")


def test_end_tokens_held_back_are_told_in_consistent_mode() -> None:
    (warning,) = parse_config(BASE, "run.yaml", ["consistent=true", "rollout.min_tokens=2"]).warnings
    assert "rollout.min_tokens 2 keeps end tokens from being drawn" in warning
    assert parse_config(BASE, "run.yaml", ["rollout.min_tokens=2"]).warnings == ()
