"""Prefill and decode over the plugin's pages in plain torch, for what the vendor's op lacks."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.attention import attend, bounds, visible
from grpo_core.ops.reference.mla import expand

from .infer import KeyValueLayer
from .latent import LatentPages
from .pages import layer_of


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`: sequence by sequence, in float32."""
    layer = layer_of(cache, KeyValueLayer)
    ends = bounds(cu_seqlens_q, q_THD.shape[0], common)
    outputs = [q_THD.new_zeros(0, q_THD.shape[1], layer.second.shape[3])]
    for (start, end), slot, length in zip(pairwise(ends), slots.tolist(), seqlens_k.tolist(), strict=True):
        if start < end:
            seen_QS = _seen(end - start, length, q_THD, window)
            outputs.append(attend(q_THD[start:end], *layer.read(slot, length), seen_QS, scale))
    return torch.cat(outputs)


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`: a prefill of one token for each sequence."""
    return prefill(
        q_BHD, cache, cu_seqlens_q=_one_each(q_BHD), seqlens_k=seqlens_k, slots=slots, scale=scale,
        window=window,
    )  # fmt: skip


def mla_prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`: sequence by sequence, expanded, in float32."""
    layer = layer_of(cache, LatentPages)
    ends = bounds(cu_seqlens_q, q_nope_THN.shape[0], common)
    q_THD = torch.cat([q_nope_THN, q_rope_THR], -1).float()
    outputs = [q_THD.new_zeros(0, *w_uv_HEL.shape[:2])]
    for (start, end), slot, length in zip(pairwise(ends), slots.tolist(), seqlens_k.tolist(), strict=True):
        if start < end:
            latent_S1L, rope_S1R = layer.read(slot, length)
            k_SHD, v_SHE = expand(latent_S1L[:, 0], rope_S1R[:, 0], w_uk_HNL, w_uv_HEL)
            seen_QS = _seen(end - start, length, q_THD, None)
            outputs.append(attend(q_THD[start:end], k_SHD, v_SHE, seen_QS, scale))
    return torch.cat(outputs).to(q_nope_THN.dtype)


def mla_decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`: a prefill of one token for each sequence."""
    return mla_prefill(
        q_nope_BHN, q_rope_BHR, cache, w_uk_HNL, w_uv_HEL, cu_seqlens_q=_one_each(q_nope_BHN),
        seqlens_k=seqlens_k, slots=slots, scale=scale,
    )  # fmt: skip


def _seen(queries: int, keys: int, like: Tensor, window: int | None) -> Tensor:
    at = torch.arange(keys, device=like.device)
    return visible(at[keys - queries :], at, causal=True, window=window)


def _one_each(q: Tensor) -> Tensor:
    return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device)
