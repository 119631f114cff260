"""What plans for CUDA say of latent attention, recurrences and experts, and what offers refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.needs import RunFacts, needs_of
from grpo_core.plan import Plan
from grpo_core.plugins import load
from grpo_core.resolve import resolve
from grpo_cuda.offers_moe import OFFERS, heads_up_to
from grpo_models.plugin import grpo_models

PUBLISHED = Path(__file__).parents[1] / "models" / "published"
OURS = ("mla.", "gated_delta.", "short_conv.", "moe.")


def models() -> dict[str, Any]:
    """Published models with an op of this table."""
    families = {known: family for family in grpo_models() for known in family.architectures}
    found = {}
    for path in sorted(PUBLISHED.glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        arch = families[config["architectures"][0]].arch(config)
        run = RunFacts(train_dtype="bfloat16", rollout_dtype="bfloat16")
        if any(need.op.startswith(OURS) for need in needs_of(arch, run)):
            found[path.stem] = arch
    return found


MODELS = models()


def plan_of(name: str, *features: str, **facts: Any) -> Plan:
    catalogue = load()
    run = RunFacts(**{"train_dtype": "bfloat16", "rollout_dtype": "bfloat16", **facts})
    needs = [need for need in needs_of(MODELS[name], run) if need.op.startswith(OURS)]
    info = catalogue.devices["cuda"].probe().info
    return resolve(needs, catalogue, replace(info, features=info.features | set(features)), on_paper=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_published_models_are_served_without_a_fallback(name: str, dtype: str) -> None:
    """With any GPU, also one that no kernel takes."""
    for features in ((), ("sm_75",), ("sm_90",), ("sm_120",)):
        plan = plan_of(name, *features, train_dtype=dtype, rollout_dtype=dtype)
        for row in plan.choices:
            assert not row.fallback and (row.chosen or row.op == "moe.layer"), row


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("features", [("sm_75",), ("sm_80",), ("sm_90",)])
def test_dispatch_and_combine_are_of_one_kind(name: str, features: tuple[str, ...]) -> None:
    """Each reads the other's record."""
    for facts in ({}, {"deterministic": True}):
        plan = plan_of(name, *features, **facts)
        chosen = {row.op: row.chosen for row in plan.choices}
        assert chosen.get("moe.dispatch") == chosen.get("moe.combine")
    both = [[one for one in OFFERS if one.op == op] for op in ("moe.dispatch", "moe.combine")]
    for one, other in zip(*both, strict=True):
        assert replace(one, op="", load="", symbols=()) == replace(other, op="", load="", symbols=())


def test_a_capturable_and_repeatable_decode_needs_no_vendor() -> None:
    for name in MODELS:
        plan = plan_of(name, "sm_90", deterministic=True)
        for row in plan.choices:
            assert row.chosen or row.op == "moe.layer", row
    capturable = {impl.op for impl in OFFERS if impl.graph and not impl.requires}
    wanted = {"mla.decode", "gated_delta.step", "short_conv.step", "moe.route", "moe.dispatch", "moe.combine"}
    assert wanted <= capturable
    assert any(impl.op == "moe.experts" and impl.graph for impl in OFFERS)


def impl(op: str, name: str) -> Impl:
    return next(one for one in OFFERS if (one.op, one.name) == (op, name))


def mla(nope: int, rope: int, value: int) -> Need:
    facts = {"qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": value}
    return Need(op="mla.varlen", facts=facts)


def test_heads_of_latent_attention() -> None:
    padded, native = heads_up_to(256, 256, padded=True), heads_up_to(192, 128, padded=False)
    info = DeviceInfo(type="cuda", name="X")
    assert padded(info, mla(128, 64, 128)) is native(info, mla(128, 64, 128)) is None
    assert padded(info, mla(8, 8, 256)) is None
    assert str(padded(info, mla(192, 72, 8))).startswith("keys of 264")
    assert native(info, mla(32, 32, 72)) == "values of 72 are wider than keys of 64"
    assert native(info, mla(30, 32, 32)) == "heads of 62 are no multiple of 8"
    assert padded(info, mla(30, 32, 64)) is None and "no multiple" in str(padded(info, mla(30, 32, 60)))
    assert heads_up_to(256, 256, padded=True, eights=False)(info, mla(30, 32, 60)) is None


def test_kernels_of_some_gpus_alone() -> None:
    need = Need(op="mla.decode")
    for feature, flash_mla, grouped, fla in (
        ("sm_75", False, False, False), ("sm_80", False, False, True), ("sm_90", True, True, True),
        ("sm_100", False, True, True),
    ):  # fmt: skip
        info = DeviceInfo(type="cuda", name="X", features=frozenset({feature}))
        for one, fits in (
            (impl("mla.decode", "flash_mla"), flash_mla), (impl("moe.experts", "grouped_mm"), grouped),
            (impl("gated_delta.chunk", "fla"), fla),
        ):  # fmt: skip
            assert one.when is not None and (one.when(info, need) is None) == fits, (feature, one.name)


def test_offers_keep_to_the_rows_that_kernels_take() -> None:
    limits = impl("moe.experts", "grouped_mm").limits
    assert 2048 in limits["hidden_size"] and 2052 not in limits["hidden_size"]
    assert 1408 in limits["intermediate_size"] and 22 not in limits["intermediate_size"]
    assert limits["dtype"] == {"bfloat16"}
    assert 4 in impl("short_conv.step", "causal_conv1d").limits["conv_kernel"]
    assert 5 not in impl("short_conv.step", "causal_conv1d").limits["conv_kernel"]
    assert 256 in impl("gated_delta.chunk", "fla").limits["key_head_dim"]
    assert 257 not in impl("gated_delta.chunk", "fla").limits["key_head_dim"]
