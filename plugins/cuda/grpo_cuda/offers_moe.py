"""Offers of moe.*, mla.*, gated_delta.* and short_conv.* on CUDA, as data; imports no torch.

Sources of the limits: flash-attn (see `offers_attention`); FlashMLA's README and flash_mla_interface.py
(heads of 576 and 512 over pages of 64, dense decode on compute capability 9.0); flash-linear-attention 0.5.0
to 0.6.0 (chunk_delta_h.py: key heads up to 256; its autotuned kernels choose by the clock, so bits may differ
from run to run); causal-conv1d (widths 2 to 4); Transformer Engine 2.x; torch 2.13 (GroupedBlas.cpp: CUTLASS
kernels for bfloat16 on 9.0 and 10.0, rows of a multiple of 16 bytes).
"""

from __future__ import annotations

from collections.abc import Iterator

from grpo_core.impl import DeviceInfo, Impl, Need

from .offer import (
    ALL_FLOATS,
    AMPERE,
    COMPILED,
    FLASH_ATTN,
    FLOATS,
    HALVES,
    HOPPER,
    LATENT_ID,
    TORCH,
    TRANSFORMER_ENGINE,
    TRITON,
    VENDOR,
    Limits,
    When,
    at_least,
    every,
    exactly,
    offer,
)
from .offers_attention import TORCH_VARLEN
from .offers_triton import REQUIRES as TRITON_PACKAGE

GROUPED_MM = ("torch>=2.10", *TRITON_PACKAGE)
"""The release that made torch.nn.functional.grouped_mm public."""
FLA = ("fla-core>=0.5,<0.7",)
"""From 0.5 on value heads may share key heads; `flash-linear-attention` brings it along."""
FLA_CONV = ("fla-core>=0.6,<0.7",)
"""Its convolution was elsewhere before."""
CONV1D = ("causal-conv1d>=1.5,<2",)
FLASH_MLA = ("flash-mla>=1",)
"""Installed from its sources: the name on PyPI holds an empty pre-release."""

_READS: Limits = {"cache": frozenset({LATENT_ID})}
_HALVES: Limits = {"dtype": HALVES}
_FLOATS: Limits = {"dtype": FLOATS}
_ALL: Limits = {"dtype": ALL_FLOATS}
_DEEPSEEK: Limits = {
    "dtype": frozenset({"bfloat16"}),
    "kv_lora_rank": frozenset({512}),
    "qk_rope_head_dim": frozenset({64}),
    **_READS,
}
_LATENTS: Limits = {
    "dtype": FLOATS,
    "kv_lora_rank": range(1, 513),
    "qk_rope_head_dim": range(1, 129),
    **_READS,
}
_FLA: Limits = {"dtype": HALVES, "key_head_dim": range(1, 257)}
_STATES: Limits = {"dtype": FLOATS, "key_head_dim": range(1, 1025)}
_ALIGNED: Limits = {
    "dtype": frozenset({"bfloat16"}),
    "hidden_size": range(8, 1 << 16, 8),
    "intermediate_size": range(8, 1 << 15, 8),
}
_ROUTED: Limits = {"router_dtype": frozenset({"float32", "float64"})}

_FA = "flash_attn.flash_attn_varlen_func"
_TE = "transformer_engine.pytorch."
_DELTA = "fla.ops.gated_delta_rule."


def heads_up_to(key: int, value: int, *, padded: bool, eights: bool = True) -> When:
    """Refuses heads of latent attention that a packed kernel does not take once they are expanded.

    `padded` heads are all of the larger size; without it values may be narrower than keys, not wider.
    """

    def when(info: DeviceInfo, need: Need) -> str | None:
        nope, rope, values = (
            int(str(need.facts[name])) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        keys = nope + rope
        if keys > key or values > value:
            return f"keys of {keys} and values of {values}: at most {key} and {value} are taken"
        if values > keys and not padded:
            return f"values of {values} are wider than keys of {keys}"
        odd = [size for size in ((max(keys, values),) if padded else (keys, values)) if size % 8]
        return f"heads of {odd[0]} are no multiple of 8" if odd and eights else None

    return when


def _latent() -> Iterator[Impl]:
    # flash-attn's own functions pad odd sizes.
    flash: When = every(at_least(AMPERE, "flash-attn"), heads_up_to(256, 256, padded=True, eights=False))
    built_in: When = every(at_least(AMPERE, "torch's varlen attention"), heads_up_to(256, 256, padded=True))
    cudnn: When = every(
        at_least(HOPPER, "cuDNN's attention of packed sequences"), heads_up_to(192, 128, padded=False)
    )
    yield offer("mla.varlen", "flash_attn", "mla_flash:varlen", rank=VENDOR + 2, limits=_HALVES,
                requires=FLASH_ATTN, symbols=(_FA,), when=flash)  # fmt: skip
    yield offer("mla.varlen", "transformer_engine", "mla_engine:varlen", rank=VENDOR, limits=_HALVES,
                requires=TRANSFORMER_ENGINE, symbols=(f"{_TE}DotProductAttention",), when=cudnn,
                deterministic=False)  # fmt: skip
    yield offer("mla.varlen", "varlen_attn", "mla_varlen:varlen", rank=COMPILED + 2, limits=_HALVES,
                requires=TORCH_VARLEN, when=built_in)  # fmt: skip
    yield offer("mla.varlen", "sdpa", "mla:varlen", rank=TORCH, limits=_ALL)
    yield offer("mla.cache", "paged", "mla_cache:LatentPageCache", rank=VENDOR, limits=_ALL, graph=True)
    yield offer("mla.prefill", "flash_attn", "mla_flash:prefill", rank=VENDOR + 2,
                limits={**_HALVES, **_READS}, requires=FLASH_ATTN, symbols=(_FA,), when=flash)  # fmt: skip
    yield offer("mla.prefill", "varlen_attn", "mla_varlen:prefill", rank=COMPILED + 2,
                limits={**_HALVES, **_READS}, requires=TORCH_VARLEN, when=built_in)  # fmt: skip
    yield offer("mla.prefill", "sdpa", "mla:prefill", rank=TORCH, limits={**_ALL, **_READS})
    yield offer("mla.decode", "flash_mla", "mla_flashmla:decode", rank=VENDOR + 2, limits=_DEEPSEEK,
                requires=FLASH_MLA, when=exactly(frozenset({HOPPER}), "FlashMLA's dense decode"),
                symbols=("flash_mla.get_mla_metadata", "flash_mla.flash_mla_with_kvcache"),
                graph=True)  # fmt: skip
    yield offer("mla.decode", "triton", "mla_triton:decode", rank=TRITON, limits=_LATENTS,
                requires=TRITON_PACKAGE, when=at_least(AMPERE), graph=True, proof="simulated")  # fmt: skip
    yield offer("mla.decode", "absorbed", "mla:decode", rank=TORCH, limits={**_ALL, **_READS}, graph=True)


def _linear() -> Iterator[Impl]:
    fla, ours = at_least(AMPERE, "flash-linear-attention"), at_least(AMPERE)
    # Triton kernels that time themselves when they are first run take other tiles from run to run.
    yield offer("gated_delta.chunk", "fla", "fla:chunk", rank=VENDOR, limits=_FLA, requires=FLA, when=fla,
                symbols=(f"{_DELTA}chunk_gated_delta_rule",), deterministic=False)  # fmt: skip
    yield offer("gated_delta.chunk", "torch", "delta:chunk", rank=TORCH, limits=_ALL)
    yield offer("gated_delta.step", "triton", "delta_triton:step", rank=TRITON, limits=_STATES,
                requires=TRITON_PACKAGE, when=ours, graph=True, proof="simulated")  # fmt: skip
    # States are copied out of their slots and back: three times the memory traffic of ours.
    yield offer("gated_delta.step", "fla", "fla:step", rank=TRITON - 1, limits=_FLA, requires=FLA, when=fla,
                symbols=(f"{_DELTA}fused_recurrent_gated_delta_rule",), graph=True)  # fmt: skip
    yield offer("gated_delta.step", "torch", "delta:step", rank=TORCH, limits=_ALL, graph=True)
    yield offer("short_conv.varlen", "fla", "fla_conv:varlen", rank=VENDOR, requires=FLA_CONV, when=fla,
                limits={**_HALVES, "conv_kernel": range(2, 9)},
                symbols=("fla.modules.causal_conv1d.causal_conv1d",), deterministic=False)  # fmt: skip
    yield offer("short_conv.varlen", "torch", "delta_conv:varlen", rank=TORCH, limits=_ALL)
    yield offer("short_conv.step", "causal_conv1d", "fla_conv1d:step", rank=VENDOR, requires=CONV1D,
                limits={**_FLOATS, "conv_kernel": range(2, 5)}, when=at_least(AMPERE, "causal-conv1d"),
                symbols=("causal_conv1d.causal_conv1d_update",), graph=True)  # fmt: skip
    yield offer("short_conv.step", "triton", "delta_triton:conv_step", rank=TRITON,
                limits={**_FLOATS, "conv_kernel": range(1, 17)}, requires=TRITON_PACKAGE, when=ours,
                graph=True, proof="simulated")  # fmt: skip
    yield offer("short_conv.step", "torch", "delta_conv:step", rank=TORCH, limits=_ALL, graph=True)


def _mixture() -> Iterator[Impl]:
    ours, engine = at_least(AMPERE), at_least(AMPERE, "Transformer Engine")
    yield offer("moe.route", "torch", "moe:route", rank=TORCH, limits=_ROUTED, graph=True)
    # The gradient of a token's weight is summed in pieces whose size an autotuned kernel chooses by the
    # clock; dispatch says the same, since the two belong together.
    for op, symbol in (("moe.dispatch", "moe_permute"), ("moe.combine", "moe_unpermute")):
        function = op.partition(".")[2]
        yield offer(op, "transformer_engine", f"moe_te:{function}", rank=VENDOR, limits=_FLOATS,
                    requires=TRANSFORMER_ENGINE, symbols=(f"{_TE}{symbol}",), when=engine,
                    deterministic=False)  # fmt: skip
        yield offer(op, "triton", f"moe_triton:{function}", rank=TRITON, limits=_FLOATS,
                    requires=TRITON_PACKAGE, when=ours, graph=True, proof="simulated")  # fmt: skip
        yield offer(op, "torch", f"moe:{function}", rank=TORCH, limits=_ALL, graph=True)
    yield offer("moe.experts", "transformer_engine", "moe_te:experts", rank=VENDOR, limits=_ALIGNED,
                requires=TRANSFORMER_ENGINE, symbols=(f"{_TE}GroupedLinear",), when=engine)  # fmt: skip
    yield offer("moe.experts", "grouped_mm", "moe_grouped:experts", rank=TRITON + 5, limits=_ALIGNED,
                requires=GROUPED_MM, when=at_least(HOPPER, "torch's grouped product"),
                graph=True)  # fmt: skip
    yield offer("moe.experts", "triton", "moe_triton:experts", rank=TRITON, limits=_FLOATS,
                requires=TRITON_PACKAGE, when=ours, graph=True, proof="simulated")  # fmt: skip
    yield offer("moe.experts", "torch", "moe:experts", rank=TORCH, limits=_ALL)


OFFERS: tuple[Impl, ...] = (*_latent(), *_linear(), *_mixture())
