"""Needs: what a model and a config ask of each op."""

from __future__ import annotations

import pytest

from grpo_core.config import Config
from grpo_core.errors import ConfigError
from grpo_core.impl import DeviceInfo, Need
from grpo_core.model.arch import Arch, Attention, DenseMLP, Layer, Rope
from grpo_core.needs import RunFacts, facts_of, needs_of
from grpo_core.ops.contract import CONTRACTS

FACTS = RunFacts(train_dtype="float32", rollout_dtype="bfloat16", world=2, recompute=True)


def arch(*, windows: tuple[int | None, ...] = (None, None), qk_norm: bool = False) -> Arch:
    rope = Rope(theta=1e4, rotary_dim=16)
    layers = tuple(
        Layer(
            mixer=Attention(num_attention_heads=8, num_key_value_heads=2, head_dim=32, rope=rope,
                            qk_norm=qk_norm, window=window),
            ffn=DenseMLP(intermediate_size=96),
        )
        for window in windows
    )  # fmt: skip
    return Arch(family="test", vocab_size=100, hidden_size=64, layers=layers, rms_norm_eps=1e-6,
                tie_word_embeddings=True, max_position_embeddings=128)  # fmt: skip


def of(op: str, **changes: object) -> list[Need]:
    return [need for need in needs_of(arch(**changes), FACTS) if need.op == op]  # type: ignore[arg-type]


def test_every_contract_but_those_of_other_kinds_of_layers_is_needed() -> None:
    others = {op for op in CONTRACTS if op.split(".")[0] in ("mla", "gated_delta", "short_conv", "moe")}
    assert len(others) == 13
    assert {need.op for need in needs_of(arch(), FACTS)} == set(CONTRACTS) - others


def test_the_facts_of_attention() -> None:
    heads = {"head_dim": 32, "v_head_dim": 32, "num_key_value_groups": 4, "window": False}
    assert of("attention.varlen") == [
        Need(op="attention.varlen", facts={"dtype": "float32", **heads}, backward=True),
        Need(op="attention.varlen", facts={"dtype": "bfloat16", **heads}),
    ]
    assert of("attention.decode") == [Need(op="attention.decode", facts={"dtype": "bfloat16", **heads})]
    step = {"qk_norm": False, "interleaved": False, "rotary_dim": 16}
    assert of("attention.step") == [
        Need(op="attention.step", facts={"dtype": "bfloat16", **heads, **step}, required=False)
    ]


def test_shared_prompts_ask_for_their_op_only_where_the_config_wants_them() -> None:
    for wanted in (True, False):
        facts = facts_of(config(train={"share_prompt": wanted}), DeviceInfo(type="cpu"))
        [need] = [need for need in needs_of(arch(), facts) if need.op == "attention.shared_prefix"]
        assert need.required is wanted


def test_like_layers_ask_once_and_unlike_ones_each() -> None:
    assert len(of("attention.decode", windows=(None, None, None))) == 1
    assert [need.facts["window"] for need in of("attention.decode", windows=(None, 64, None))] == [
        False,
        True,
    ]


def test_an_op_of_both_roles_is_asked_in_both_dtypes_and_differentiated_by_the_trainer_only() -> None:
    assert [(need.facts["dtype"], need.backward) for need in of("mlp.swiglu")] == [
        ("float32", True), ("bfloat16", False),
    ]  # fmt: skip


def test_qk_norm_asks_for_a_norm_over_the_head() -> None:
    assert {need.facts["hidden_size"] for need in of("norm.rms")} == {64}
    assert {need.facts["hidden_size"] for need in of("norm.rms", qk_norm=True)} == {32, 64}


def test_the_facts_of_the_run() -> None:
    assert of("comm.collectives")[0].facts == {"world": 2}
    assert of("engine.train")[0].facts == {"dtype": "float32", "world": 2, "recompute": True}
    assert of("optim.adamw")[0].facts == {"dtype": "float32"}


def config(**sections: object) -> Config:
    return Config.model_validate(
        {"model": "m", "data": {"train": "d.jsonl"}, "rewards": [{"name": "exact"}], **sections}
    )


@pytest.mark.parametrize(
    ("features", "train", "rollout", "expected"),
    [
        ((), "auto", "auto", ("float32", "float32")),
        (("fast_bf16",), "auto", "auto", ("bfloat16", "bfloat16")),
        (("fast_bf16",), "float32", "auto", ("float32", "float32")),
        ((), "auto", "bfloat16", ("float32", "bfloat16")),
        ((), "bfloat16", "float32", ("bfloat16", "float32")),
    ],
)
def test_auto_dtypes(features: tuple[str, ...], train: str, rollout: str, expected: tuple[str, str]) -> None:
    info = DeviceInfo(type="cpu", features=frozenset(features))
    facts = facts_of(config(train={"dtype": train}, rollout={"dtype": rollout}), info)
    assert (facts.train_dtype, facts.rollout_dtype) == expected


def test_consistent_runs_ask_every_op_that_a_sequence_passes_through() -> None:
    facts = RunFacts(train_dtype="float32", rollout_dtype="float32", consistent=True)
    asked = {need.op for need in needs_of(arch(), facts) if need.batch_invariant}
    free = {need.op for need in needs_of(arch(), facts)} - asked
    assert free == {"optim.adamw", "memory.allocator", "comm.collectives"}
    assert not any(need.batch_invariant for need in needs_of(arch(), FACTS))


def test_consistent_runs_refuse_two_dtypes() -> None:
    train = {"data": {"train": "x"}, "rewards": [{"name": "exact"}], "model": "m", "consistent": True}
    for rollout, message in (("auto", ""), ("float32", ""), ("bfloat16", "rollout in bfloat16")):
        config = Config.model_validate(
            {**train, "train": {"dtype": "float32"}, "rollout": {"dtype": rollout}}
        )
        if message:
            with pytest.raises(ConfigError, match=message):
                facts_of(config, DeviceInfo(type="cpu"))
        else:
            assert facts_of(config, DeviceInfo(type="cpu")).consistent
