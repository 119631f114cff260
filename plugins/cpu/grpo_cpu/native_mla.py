"""mla.varlen and mla.prefill over the packed attention of the C++ pack, bfloat16 or float32."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.attention import bounds

from .mla import Packed, expand, prefill_with
from .mla_cache import shared_latents
from .native_attention import shared_prefix
from .native_attention import varlen as packed_varlen

NATIVE = Packed(varlen=packed_varlen, shared_prefix=shared_prefix)


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """mla.varlen."""
    k_THD, v_THE = expand(latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    return NATIVE(
        torch.cat([q_nope_THN, q_rope_THR], -1), k_THD, v_THE, cu_seqlens, parents, max_seqlen, scale
    )


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """mla.prefill over a `SharedLatentLayer`."""
    return prefill_with(
        NATIVE, q_nope_THN, q_rope_THR, shared_latents(cache), w_uk_HNL, w_uv_HEL,
        bounds(cu_seqlens_q, q_nope_THN.shape[0], common), seqlens_k.tolist(), slots.tolist(), scale,
    )  # fmt: skip
