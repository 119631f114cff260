"""What plain torch offers on a CPU, as data; imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from grpo_core.impl import NOTHING, Impl

CACHE_ID = "cpu:torch"
_FLOATS: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16", "float32"})}


def offers() -> Iterable[tuple[str, Impl]]:
    """Pairs of a hook's name, without its prefix, and an offer for it."""
    reads = {**_FLOATS, "cache": frozenset({CACHE_ID})}
    yield "attention", _offer("attention.varlen", "attention:varlen", _FLOATS, backward=True)
    yield "attention", _offer("attention.shared_prefix", "attention:shared_prefix", _FLOATS, backward=True)
    yield "attention", _offer("attention.cache", "cache:SharedCache", _FLOATS)
    yield "attention", _offer("attention.prefill", "decode:prefill", reads)
    yield "attention", _offer("attention.decode", "decode:decode", reads)
    yield "fused_ops", _offer("norm.rms", "norm:rms_norm", _FLOATS, backward=True)
    yield "fused_ops", _offer("rope.apply", "rope:rope_apply", _FLOATS, backward=True)
    yield "fused_ops", _offer("mlp.swiglu", "mlp:swiglu", _FLOATS, backward=True)
    yield "fused_ops", _offer("sample.token", "sample:sample_token", _FLOATS)
    yield "fused_ops", _offer("loss.logprob", "logprob:logprob", _FLOATS, backward=True)
    yield "fused_ops", _offer("optim.adamw", "adamw:adamw", {"dtype": frozenset({"float32"})})
    yield "fused_ops", _offer("linear.packed", "linear:OneDnnLinear", _FLOATS, name="onednn")
    yield "memory", _offer("memory.allocator", "memory:CpuMemory", NOTHING, name="glibc")
    yield "collectives", _offer("comm.collectives", "collectives:Gloo", {"world": range(2, 4097)}, name="gloo")


def _offer(
    op: str, target: str, limits: Mapping[str, Container[object]], *, name: str = "torch",
    backward: bool = False,
) -> Impl:  # fmt: skip
    return Impl(
        op=op,
        name=name,
        device="cpu",
        load=f"grpo_cpu.{target}",
        limits=limits,
        backward=backward,
        deterministic=True,
        rank=50,
    )
