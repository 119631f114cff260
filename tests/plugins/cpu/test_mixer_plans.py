"""Which offers the plan chooses on a CPU for latent attention and the gated delta rule."""

from __future__ import annotations

import pytest
from plan_helpers import catalogue_of

from grpo_core import builtin
from grpo_core.impl import DeviceInfo, Need
from grpo_core.plan import Plan
from grpo_core.resolve import resolve
from grpo_cpu import plugin

PACK = frozenset({"avx512_bf16", "compiler"})
MOONLIGHT = {
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512,
    "num_attention_heads": 16,
}  # fmt: skip
ODD = {**MOONLIGHT, "qk_nope_head_dim": 24, "qk_rope_head_dim": 12, "v_head_dim": 20}
DELTA = {"key_head_dim": 128, "value_head_dim": 128, "num_value_groups": 2}


def plan(needs: list[Need], features: frozenset[str]) -> Plan:
    hooks = ("attention", "linear_attention")
    catalogue = catalogue_of(
        {
            "core": [impl for hook in hooks for impl in getattr(builtin, f"grpo_{hook}")()],
            "cpu": [impl for hook in hooks for impl in getattr(plugin, f"grpo_{hook}")()],
        }
    )
    return resolve(needs, catalogue, DeviceInfo(type="cpu", features=features))


def latent_needs(dtype: str, sizes: dict[str, int]) -> list[Need]:
    facts = {"dtype": dtype, **sizes}
    return [
        Need(op="mla.varlen", facts={**facts, "shared_prefix": True}, backward=True),
        *(Need(op=f"mla.{name}", facts=facts) for name in ("cache", "prefill", "decode")),
    ]


@pytest.mark.parametrize("dtype, sizes, features, kernel", [
    ("bfloat16", MOONLIGHT, PACK, "native"),
    ("bfloat16", ODD, PACK, "torch"),
    ("float32", MOONLIGHT, PACK, "native"),
    ("bfloat16", MOONLIGHT, frozenset(), "torch"),
])  # fmt: skip
def test_latent_attention(dtype: str, sizes: dict[str, int], features: frozenset[str], kernel: str) -> None:
    chosen = {row.op: row.chosen for row in plan(latent_needs(dtype, sizes), features).choices}
    assert chosen == {
        "mla.varlen": f"cpu:{kernel}",
        "mla.cache": "cpu:torch",
        "mla.prefill": f"cpu:{kernel}",
        "mla.decode": "cpu:torch",
    }


@pytest.mark.parametrize("features, kernel", [(PACK, "native"), (frozenset(), "torch")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gated_delta(dtype: str, features: frozenset[str], kernel: str) -> None:
    needs = [
        Need(op="gated_delta.chunk", facts={"dtype": dtype, **DELTA}, backward=True),
        Need(op="gated_delta.step", facts={"dtype": dtype, **DELTA}),
        Need(op="short_conv.varlen", facts={"dtype": dtype, "conv_kernel": 4}, backward=True),
        Need(op="short_conv.step", facts={"dtype": dtype, "conv_kernel": 4}),
    ]
    chosen = {row.op: row.chosen for row in plan(needs, features).choices}
    assert chosen == {
        "gated_delta.chunk": f"cpu:{kernel}",
        "gated_delta.step": f"cpu:{kernel}",
        "short_conv.varlen": f"cpu:{kernel}",
        "short_conv.step": f"cpu:{kernel}",
    }


def test_the_reference_cache_brings_readers_of_its_layout() -> None:
    """A pin of the cache alone moves its readers; the packed op stays where it was."""
    free = plan(latent_needs("bfloat16", MOONLIGHT), PACK)
    assert free.choice("mla.cache").chosen == "cpu:torch"
    catalogue = catalogue_of({"core": list(builtin.grpo_attention()), "cpu": list(plugin.grpo_attention())})
    pinned = resolve(
        latent_needs("bfloat16", MOONLIGHT), catalogue, DeviceInfo(type="cpu", features=PACK),
        pins={"mla.cache": "core:reference"},
    )  # fmt: skip
    assert {row.op: row.chosen for row in pinned.choices} == {
        "mla.varlen": "cpu:native",
        "mla.cache": "core:reference",
        "mla.prefill": "cpu:consistent",
        "mla.decode": "cpu:consistent",
    }
