"""What the C++ pack offers, as data; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

from grpo_core.impl import DeviceInfo, Impl, Need

from .contracts import CONTRACT

RANK = 80
CACHE_ID = "cpu:native"
LATENT_CACHE_ID = "cpu:torch"
"""The cache of latents is torch's; its rows are expanded for the pack's kernels."""
_FLOATS: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16", "float32"})}
_HEADS = frozenset(range(32, 257, 32))
_ATTENTION = {**_FLOATS, "head_dim": _HEADS, "v_head_dim": _HEADS}
_PACKAGE = "grpo_cpu"
ROW_BY_ROW = frozenset({"norm.rms", "rope.apply", "mlp.swiglu", "moe.dispatch"})
"""Ops that compute, or move, each row alone: the ends of rows go through the same instructions, masked."""


def refuse(info: DeviceInfo, need: Need) -> str | None:
    """Why the pack cannot be built or run on this machine, or None."""
    if "avx512_bf16" not in info.features:
        return "the C++ pack needs a CPU with AVX512-BF16"
    if "compiler" not in info.features:
        return "the C++ pack is built on first use and no C++ compiler (g++) is on PATH"
    return None


def refuse_mla(info: DeviceInfo, need: Need) -> str | None:
    """Why the packed attention cannot take expanded latent heads, or None."""
    reason = refuse(info, need)
    head_dim = sum(int(str(need.facts.get(f"qk_{part}_head_dim", 0))) for part in ("nope", "rope"))
    if reason is None and head_dim not in _HEADS:
        return f"queries of {head_dim}, without and with rotary, are not a multiple of 32 up to 256"
    return reason


def refuse_odd(info: DeviceInfo, need: Need) -> str | None:
    """Why the experts' kernels, which read bfloat16 in pairs, cannot serve, or None."""
    sizes = {name: need.facts.get(name, 0) for name in ("hidden_size", "intermediate_size")}
    odd = [f"{name} {size}" for name, size in sizes.items() if int(str(size)) % 2]
    reason = refuse(info, need)
    if reason is None and odd and need.facts.get("dtype") == "bfloat16":
        return f"{' and '.join(odd)} cannot be read in pairs"
    return reason


def refuse_wide(info: DeviceInfo, need: Need) -> str | None:
    """Why the convolution, whose inputs in sight lie in registers, cannot serve, or None."""
    width = int(str(need.facts.get("conv_kernel", 0)))
    return refuse(info, need) or (f"conv_kernel {width} is above 16" if width > 16 else None)


def offers() -> Iterable[tuple[str, Impl]]:
    """Pairs of a hook's name, without its prefix, and an offer for it."""
    reads = {**_ATTENTION, "cache": frozenset({CACHE_ID})}
    train, cache = "native_attention", "native_cache"
    yield "attention", _offer("attention.varlen", train, "varlen", _ATTENTION, backward=True)
    yield "attention", _offer("attention.shared_prefix", train, "shared_prefix", _ATTENTION, backward=True)
    yield "attention", _offer("attention.cache", cache, "PagedCache", _ATTENTION)
    yield "attention", _offer("attention.prefill", cache, "prefill", reads)
    yield "attention", _offer("attention.decode", cache, "decode", reads)
    yield "attention", _offer("attention.step", cache, "step", reads)
    mla = {**_FLOATS, "v_head_dim": _HEADS}
    latents = {**mla, "cache": frozenset({LATENT_CACHE_ID})}
    yield "attention", _offer("mla.varlen", "native_mla", "varlen", mla, backward=True, when=refuse_mla)
    yield "attention", _offer("mla.prefill", "native_mla", "prefill", latents, when=refuse_mla)
    recurrent = "native_recurrent"
    yield ("linear_attention", _offer("gated_delta.chunk", recurrent, "delta_chunk", _FLOATS, backward=True))
    yield "linear_attention", _offer("gated_delta.step", recurrent, "delta_step", _FLOATS)
    yield (
        "linear_attention",
        _offer("short_conv.varlen", recurrent, "conv_varlen", _FLOATS, backward=True, when=refuse_wide),
    )
    yield "linear_attention", _offer("short_conv.step", recurrent, "conv_step", _FLOATS)
    floats: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16", "float32"})}
    for part in ("route", "dispatch", "combine"):
        yield "fused_moe", _offer(f"moe.{part}", "native_moe", part, floats, backward=True)
    yield (
        "fused_moe",
        _offer("moe.experts", "native_moe", "experts", floats, backward=True, when=refuse_odd),
    )
    yield "fused_ops", _offer("norm.rms", "native_ops", "rms_norm", _FLOATS, backward=True)
    yield "fused_ops", _offer("rope.apply", "native_ops", "rope_apply", _FLOATS, backward=True)
    yield "fused_ops", _offer("mlp.swiglu", "native_ops", "swiglu", _FLOATS, backward=True)
    yield (
        "fused_ops",
        _offer("sample.token", "native_ops", "sample_token", {"dtype": frozenset({"bfloat16", "float32"})}),
    )
    yield "fused_ops", _offer("optim.adamw", "native_ops", "adamw", {"dtype": frozenset({"float32"})})
    yield "fused_ops", _offer("linear.dense", "native_linear", "dense", _FLOATS, backward=True)
    yield "fused_ops", _offer("linear.packed", "native_linear", "PackedLinear", _FLOATS)
    yield "fused_ops", _offer("loss.logprob", "native_logprob", "logprob", _FLOATS, backward=True)


def _offer(
    op: str, module: str, attribute: str, limits: Mapping[str, Container[object]], *,
    backward: bool = False, when: Callable[[DeviceInfo, Need], str | None] = refuse,
) -> Impl:  # fmt: skip
    return Impl(
        op=op,
        name="native",
        device="cpu",
        load=f"{_PACKAGE}.{module}:{attribute}",
        limits=limits,
        when=when,
        backward=backward,
        deterministic=True,
        contract=CONTRACT,
        batch_invariant=op in ROW_BY_ROW,
        rank=RANK,
    )
