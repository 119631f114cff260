"""Latent attention, expanded, with flash-attn: one size of heads up to 256, so the smaller are padded."""

from __future__ import annotations

from flash_attn import flash_attn_varlen_func
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer

from . import flash
from .lengths import rows
from .mla import Kernels, Prompts, fill, train


def _cross(q_THD: Tensor, k_NHD: Tensor, v_NHE: Tensor, prompts: Prompts, *, scale: float) -> Tensor:
    out: Tensor = flash_attn_varlen_func(
        q_THD,
        k_NHD,
        v_NHE,
        cu_seqlens_q=prompts.cu_seqlens_q,
        cu_seqlens_k=prompts.cu_seqlens_k,
        max_seqlen_q=rows(prompts.max_seqlen_q),
        max_seqlen_k=prompts.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1),
    )
    return out


FLASH = Kernels(varlen=flash.varlen, shared_prefix=flash.shared_prefix, cross=_cross, one_size=True)


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    return train(
        FLASH, q_nope_THN, q_rope_THR, latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL, cu_seqlens, parents,
        max_seqlen, scale, common,
    )  # fmt: skip


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`, over `LatentPages`."""
    return fill(FLASH, q_nope_THN, q_rope_THR, cache, w_uk_HNL, w_uv_HEL, cu_seqlens_q, seqlens_k, slots,
                scale, common)  # fmt: skip
