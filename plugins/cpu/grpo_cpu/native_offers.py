"""What the C++ pack offers, as data; imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from grpo_core.impl import DeviceInfo, Impl, Need

RANK = 80
CACHE_ID = "cpu:native"
_BF16: Mapping[str, Container[object]] = {"dtype": frozenset({"bfloat16"})}
_HEADS = frozenset(range(32, 257, 32))
_ATTENTION = {**_BF16, "head_dim": _HEADS, "v_head_dim": _HEADS}
_PACKAGE = "grpo_cpu"


def refuse(info: DeviceInfo, need: Need) -> str | None:
    """Why the pack cannot be built or run on this machine, or None."""
    if "avx512_bf16" not in info.features:
        return "the C++ pack needs a CPU with AVX512-BF16"
    if "compiler" not in info.features:
        return "the C++ pack is built on first use and no C++ compiler (g++) is on PATH"
    return None


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
    yield "fused_ops", _offer("norm.rms", "native_ops", "rms_norm", _BF16, backward=True)
    yield "fused_ops", _offer("rope.apply", "native_ops", "rope_apply", _BF16, backward=True)
    yield "fused_ops", _offer("mlp.swiglu", "native_ops", "swiglu", _BF16, backward=True)
    yield (
        "fused_ops",
        _offer("sample.token", "native_ops", "sample_token", {"dtype": frozenset({"bfloat16", "float32"})}),
    )
    yield "fused_ops", _offer("optim.adamw", "native_ops", "adamw", {"dtype": frozenset({"float32"})})
    yield "fused_ops", _offer("loss.logprob", "native_logprob", "logprob", _BF16, backward=True)


def _offer(
    op: str, module: str, attribute: str, limits: Mapping[str, Container[object]], *, backward: bool = False
) -> Impl:
    return Impl(
        op=op,
        name="native",
        device="cpu",
        load=f"{_PACKAGE}.{module}:{attribute}",
        limits=limits,
        when=refuse,
        backward=backward,
        deterministic=True,
        rank=RANK,
    )
