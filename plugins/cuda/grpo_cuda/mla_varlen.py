"""Latent attention, expanded, with torch's varlen kernel: one size of heads, so the smaller are padded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer

from . import varlen as built_in
from .lengths import rows
from .mla import Kernels, Prompts, fill, train

CAUSAL = (-1, 0)
"""window_size: all keys before a query's own, none after; aligned at the end."""


def _cross(q_THD: Tensor, k_NHD: Tensor, v_NHE: Tensor, prompts: Prompts, *, scale: float) -> Tensor:
    out: Any = varlen_attn(
        q_THD,
        k_NHD,
        v_NHE,
        cu_seq_q=prompts.cu_seqlens_q,
        cu_seq_k=prompts.cu_seqlens_k,
        max_q=rows(prompts.max_seqlen_q),
        max_k=prompts.max_seqlen_k,
        scale=scale,
        window_size=CAUSAL,
    )
    attended: Tensor = out
    return attended


BUILT_IN = Kernels(varlen=built_in.varlen, shared_prefix=built_in.shared_prefix, cross=_cross, one_size=True)


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    return train(
        BUILT_IN, q_nope_THN, q_rope_THR, latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL, cu_seqlens, parents,
        max_seqlen, scale, common,
    )  # fmt: skip


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`, over `LatentPages`."""
    return fill(BUILT_IN, q_nope_THN, q_rope_THR, cache, w_uk_HNL, w_uv_HEL, cu_seqlens_q, seqlens_k, slots,
                scale, common)  # fmt: skip
