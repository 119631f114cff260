"""What the simulated device offers: plain torch on its tensors, within limits unlike any other device's.

Most offers are the core's references, which compute on any device; attention over a cache, sampling, memory
and collectives are the device's own.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS, Contract

DTYPES = frozenset({"bfloat16", "float16", "float32"})
FLOAT32 = frozenset({"float32"})
HEADS = range(16, 257, 16)
"""Head dims are multiples of 16."""
RANKS = range(16, 1025, 16)
PAGE = 128
"""Tokens of a page of the cache."""
HERE = "grpo_conformance.sim"

Limits = Mapping[str, Container[object]]

OWN: Mapping[str, str] = {
    "attention.cache": f"{HERE}.attention:PagedCache",
    "attention.prefill": f"{HERE}.attention:prefill",
    "attention.decode": f"{HERE}.attention:decode",
    "sample.token": f"{HERE}.sample:sample_token",
    "memory.allocator": f"{HERE}.memory:SimMemory",
    "comm.collectives": f"{HERE}.collectives:SimCollectives",
}
"""Pointers of the ops that are not served by the core's reference."""

_ATTENTION: Limits = {"dtype": DTYPES, "head_dim": HEADS, "v_head_dim": HEADS}
_MLA: Limits = {
    "dtype": DTYPES,
    "qk_nope_head_dim": HEADS,
    "qk_rope_head_dim": HEADS,
    "v_head_dim": HEADS,
    "kv_lora_rank": RANKS,
}
_DELTA: Limits = {"dtype": DTYPES, "key_head_dim": HEADS, "value_head_dim": HEADS}
_MOE: Limits = {"dtype": DTYPES, "router_dtype": FLOAT32}
LIMITS: Mapping[str, Limits] = {
    "attention.varlen": _ATTENTION,
    "attention.shared_prefix": _ATTENTION,
    "attention.cache": _ATTENTION,
    "attention.prefill": {**_ATTENTION, "cache": frozenset({"sim:plain"})},
    "attention.decode": {**_ATTENTION, "cache": frozenset({"sim:plain"})},
    "mla.varlen": _MLA,
    "mla.cache": _MLA,
    "mla.prefill": {**_MLA, "cache": frozenset({"sim:plain"})},
    "mla.decode": {**_MLA, "cache": frozenset({"sim:plain"})},
    "gated_delta.chunk": _DELTA,
    "gated_delta.step": _DELTA,
    "moe.route": _MOE,
    "moe.dispatch": _MOE,
    "moe.experts": _MOE,
    "moe.combine": _MOE,
    "optim.adamw": {"dtype": FLOAT32},
    "memory.allocator": {},
    "comm.collectives": {"world": range(1, 9)},
}
"""Ops without a row take every size in the device's dtypes."""
GRAPH = frozenset(
    {
        "attention.cache", "attention.decode", "rope.apply", "norm.rms", "mlp.swiglu", "linear.packed",
        "linear.dense", "gated_delta.step", "short_conv.step",
    }
)  # fmt: skip
"""Ops that a graph can record: their host never waits for the device."""


def offers(hook: str) -> Iterable[Impl]:
    """The offers of one hook: one for each op that has a reference, besides the engines."""
    for contract in CONTRACTS.values():
        if contract.hook == hook and contract.reference and not contract.op.startswith("engine."):
            yield _offer(contract)


def _offer(contract: Contract) -> Impl:
    op = contract.op
    return Impl(
        op=op,
        name="plain",
        device="sim",
        load=OWN.get(op, contract.reference or ""),
        limits=LIMITS.get(op, {"dtype": DTYPES}),
        backward=contract.backward,
        graph=op in GRAPH,
        deterministic=True,
        rank=50,
        contract=contract.version,
    )
