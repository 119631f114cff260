"""mla.*: the absorbed form in training as well as in decoding, over the blocks of `consistent_attention`.

Queries are carried to the latent, so that latents and rotary keys are the keys of a single head and latents
its values: the same products in the packed and in the cached form, and nothing is expanded in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.attention import bounds, parent_list
from grpo_core.ops.reference.mla import DenseLatentLayer

from . import mla as gradient
from .consistent import borrowed, by_head
from .consistent_attention import Sequences, attend, cached, packed


def absorbed(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_XL: Tensor, k_rope_XR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, seqs: Sequences, scale: float,
) -> Tensor:  # fmt: skip
    """o_THE in the dtype of q, all sums in float32."""
    q_latent_THL = by_head(q_nope_THN.float(), w_uk_HNL.float().mT)
    q_THD = torch.cat([q_latent_THL, q_rope_THR.float()], -1)
    k_X1D = torch.cat([latent_XL, k_rope_XR], -1)[:, None]
    o_THL = attend(q_THD, k_X1D, latent_XL[:, None], seqs, scale)
    return by_head(o_THL, w_uv_HEL.float()).to(q_nope_THN.dtype)


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`."""
    ends = bounds(cu_seqlens, q_nope_THN.shape[0], common)
    segments = len(ends) - 1
    tree = [-1] * segments if parents is None else parent_list(parents, segments, common)

    def exact(*tensors: Tensor) -> Tensor:
        return absorbed(*tensors, packed(ends, tree), scale)

    def smooth(*tensors: Tensor) -> Tensor:
        return gradient.varlen(
            *tensors, cu_seqlens=cu_seqlens, parents=parents, max_seqlen=max_seqlen, scale=scale
        )

    o_THE = borrowed(exact, smooth, q_nope_THN, q_rope_THR, latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    assert isinstance(o_THE, Tensor)
    return o_THE


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`; over a layer of core's `DenseLatentCache`."""
    if not isinstance(cache, DenseLatentLayer):
        raise TypeError(f"consistent attention reads layers of DenseLatentCache, not {type(cache).__name__}")
    seqs = cached(cache.table, bounds(cu_seqlens_q, q_nope_THN.shape[0], common), slots, seqlens_k)
    return absorbed(q_nope_THN, q_rope_THR, cache.latent_XL, cache.k_rope_XR, w_uk_HNL, w_uv_HEL, seqs, scale)


def decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`."""
    one_each = torch.arange(q_nope_BHN.shape[0] + 1, dtype=torch.int32)
    return prefill(
        q_nope_BHN, q_rope_BHR, cache, w_uk_HNL, w_uv_HEL, cu_seqlens_q=one_each, seqlens_k=seqlens_k,
        slots=slots, scale=scale,
    )  # fmt: skip
