"""What plain torch offers on a CPU, as data; imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Container, Iterable, Mapping

from grpo_core.impl import NOTHING, DeviceInfo, Impl, Need

from .contracts import CONTRACT

CACHE_ID = "cpu:torch"
_FLOATS: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16", "float32"})}


def no_onednn(info: DeviceInfo, need: Need) -> str | None:
    """Why packed layers are refused: torch has oneDNN on x86-64 and 64-bit Arm only."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "aarch64", "arm64"):
        return None
    return f"torch is not built with oneDNN for {machine}"


def offers() -> Iterable[tuple[str, Impl]]:
    """Pairs of a hook's name, without its prefix, and an offer for it."""
    reads = {**_FLOATS, "cache": frozenset({CACHE_ID})}
    yield "attention", _offer("attention.varlen", "attention:varlen", _FLOATS, backward=True)
    yield "attention", _offer("attention.shared_prefix", "attention:shared_prefix", _FLOATS, backward=True)
    yield "attention", _offer("attention.cache", "cache:SharedCache", _FLOATS)
    yield "attention", _offer("attention.prefill", "decode:prefill", reads)
    yield "attention", _offer("attention.decode", "decode:decode", reads)
    yield "attention", _offer("mla.varlen", "mla:varlen", _FLOATS, backward=True)
    yield "attention", _offer("mla.cache", "mla_cache:SharedLatentCache", _FLOATS)
    yield "attention", _offer("mla.prefill", "mla:prefill", reads)
    yield "attention", _offer("mla.decode", "mla_absorbed:decode", reads)
    yield "linear_attention", _offer("gated_delta.chunk", "delta:chunk", _FLOATS, backward=True)
    yield "linear_attention", _offer("gated_delta.step", "delta:step", _FLOATS)
    yield "linear_attention", _offer("short_conv.varlen", "short_conv:varlen", _FLOATS, backward=True)
    yield "linear_attention", _offer("short_conv.step", "short_conv:step", _FLOATS)
    yield "fused_moe", _offer("moe.dispatch", "moe:dispatch", _FLOATS, backward=True)
    yield "fused_moe", _offer("moe.experts", "moe:experts", _FLOATS, backward=True)
    yield "fused_moe", _offer("moe.combine", "moe:combine", _FLOATS, backward=True)
    yield "fused_ops", _offer("norm.rms", "norm:rms_norm", _FLOATS, backward=True)
    yield "fused_ops", _offer("rope.apply", "rope:rope_apply", _FLOATS, backward=True)
    yield "fused_ops", _offer("mlp.swiglu", "mlp:swiglu", _FLOATS, backward=True)
    yield "fused_ops", _offer("sample.token", "sample:sample_token", _FLOATS)
    yield "fused_ops", _offer("loss.logprob", "logprob:logprob", _FLOATS, backward=True)
    yield "fused_ops", _offer("optim.adamw", "adamw:adamw", {"dtype": frozenset({"float32"})})
    yield "fused_ops", _offer("linear.dense", "dense:dense", _FLOATS, backward=True)
    yield "fused_ops", _offer("linear.packed", "linear:OneDnnLinear", _FLOATS, name="onednn", when=no_onednn)
    yield "memory", _offer("memory.allocator", "memory:CpuMemory", NOTHING, name="glibc")
    yield (
        "collectives",
        _offer("comm.collectives", "collectives:Gloo", {"world": range(2, 4097)}, name="gloo"),
    )


def _offer(
    op: str, target: str, limits: Mapping[str, Container[object]], *, name: str = "torch",
    backward: bool = False, when: Callable[[DeviceInfo, Need], str | None] | None = None,
) -> Impl:  # fmt: skip
    return Impl(
        op=op,
        name=name,
        device="cpu",
        load=f"grpo_cpu.{target}",
        limits=limits,
        when=when,
        backward=backward,
        deterministic=True,
        contract=CONTRACT,
        rank=50,
    )
