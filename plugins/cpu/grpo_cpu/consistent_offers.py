"""Offers whose results do not depend on the batch, as data; imports no torch.

They rank below the fast ones, so that they serve only where `consistent: true` asks for them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from grpo_core.impl import Impl

from .contracts import CONTRACT

RANK = 10
CACHE_ID = "core:reference"
_FLOATS: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16", "float32"})}
_ROUTER: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16", "float32", "float64"})}
_READS = {**_FLOATS, "cache": frozenset({CACHE_ID})}


def offers() -> Iterable[tuple[str, Impl]]:
    """Pairs of a hook's name, without its prefix, and an offer for it."""
    for op in ("varlen", "shared_prefix"):
        yield "attention", _offer(f"attention.{op}", f"attention:{op}", _FLOATS, backward=True)
    yield "attention", _offer("mla.varlen", "mla:varlen", _FLOATS, backward=True)
    for op in ("prefill", "decode"):
        yield "attention", _offer(f"attention.{op}", f"attention:{op}", _READS)
        yield "attention", _offer(f"mla.{op}", f"mla:{op}", _READS)
    yield "linear_attention", _offer("gated_delta.chunk", "recurrent:chunk", _FLOATS, backward=True)
    yield "linear_attention", _offer("gated_delta.step", "recurrent:step", _FLOATS)
    yield "linear_attention", _offer("short_conv.varlen", "recurrent:conv_varlen", _FLOATS, backward=True)
    yield "linear_attention", _offer("short_conv.step", "recurrent:conv_step", _FLOATS)
    for part in ("route", "experts", "combine"):
        yield "fused_moe", _offer(f"moe.{part}", f"moe:{part}", _FLOATS, backward=True)
    yield "fused_ops", _offer("mlp.swiglu", "fused:swiglu", _FLOATS, backward=True)
    yield "fused_ops", _offer("linear.dense", "fused:linear_dense", _ROUTER, backward=True)
    yield "fused_ops", _offer("linear.packed", "fused:ConsistentLinear", _FLOATS)
    yield "fused_ops", _offer("loss.logprob", "logprob:logprob", _FLOATS, backward=True)
    yield "fused_ops", _offer("sample.token", "logprob:sample_token", _FLOATS)


def _offer(op: str, target: str, limits: Mapping[str, Container[object]], *, backward: bool = False) -> Impl:
    return Impl(
        op=op,
        name="consistent",
        device="cpu",
        load=f"grpo_cpu.consistent_{target}",
        limits=limits,
        backward=backward,
        deterministic=True,
        contract=CONTRACT,
        batch_invariant=True,
        rank=RANK,
    )
