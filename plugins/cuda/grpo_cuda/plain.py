"""Prefill and decode over pages in plain torch: for what the fused kernels do not take, float32 above all."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import accumulate, bounds, visible

from .cache import PagedLayer, paged

GATHERED = 1 << 24
"""Most key elements that a block of sequences gathers to decode."""


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`, over a `PagedLayer`: sequence by sequence."""
    layer = paged(cache)
    ends = bounds(cu_seqlens_q, q_THD.shape[0], common)
    numbers = slots.tolist()
    lengths = seqlens_k.tolist() if common is None else common.seqlens_k or seqlens_k.tolist()
    outputs = [q_THD.new_empty(0, q_THD.shape[1], layer.v_PSKE.shape[3])]
    for (start, end), slot, length in zip(pairwise(ends), numbers, lengths, strict=True):
        if start < end:
            outputs.append(_one(q_THD[start:end], layer, slot, length, scale, window))
    return torch.cat(outputs)


def _one(
    q_QHD: Tensor, layer: PagedLayer, slot: int, length: int, scale: float, window: int | None
) -> Tensor:
    """The last queries of one sequence against all that is cached of it."""
    pages = layer.table.pages_SP[slot, : -(-length // layer.table.page_size)]
    k_1KLD, v_1KLE = (
        pool[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for pool in (layer.k_PSKD, layer.v_PSKE)
    )
    at = torch.arange(length, device=q_QHD.device)
    seen_QL = visible(at[length - q_QHD.shape[0] :], at, causal=True, window=window)
    o_1HQE = scaled_dot_product_attention(
        q_QHD.transpose(0, 1)[None], k_1KLD.to(q_QHD.dtype), v_1KLE.to(q_QHD.dtype), attn_mask=seen_QL,
        scale=scale, enable_gqa=True,
    )  # fmt: skip
    return o_1HQE[0].transpose(0, 1)


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`, over a `PagedLayer`: blocks of sequences, padded to the longest;
    scores are float32 or wider."""
    layer = paged(cache)
    B, H, _ = q_BHD.shape
    if not B:
        return q_BHD.new_empty(0, H, layer.v_PSKE.shape[3])
    blocks_BW = layer.reading(slots, seqlens_k, common).blocks_BW
    each = layer.k_PSKD[0].numel() * blocks_BW.shape[1]
    step = max(1, GATHERED // max(each, 1))
    parts = [slice(start, start + step) for start in range(0, B, step)]
    return torch.cat(
        [_block(q_BHD[part], layer, blocks_BW[part], seqlens_k[part], scale, window) for part in parts]
    )


def _block(
    q_BHD: Tensor, layer: PagedLayer, blocks_BW: Tensor, lengths_B: Tensor, scale: float, window: int | None
) -> Tensor:
    acc = accumulate(q_BHD.dtype)
    B, H, D = q_BHD.shape
    K = layer.k_PSKD.shape[2]
    k_BLKD, v_BLKE = (pool[blocks_BW].flatten(1, 2) for pool in (layer.k_PSKD, layer.v_PSKE))
    at_L = torch.arange(k_BLKD.shape[1], device=q_BHD.device)
    back_BL = lengths_B[:, None] - 1 - at_L
    hidden_BL = (back_BL < 0) if window is None else (back_BL < 0) | (back_BL >= window)
    q_BKrD = q_BHD.view(B, K, H // K, D).to(acc)
    scores_BKrL = torch.matmul(q_BKrD, k_BLKD.permute(0, 2, 3, 1).to(acc)) * scale
    p_BKrL = scores_BKrL.masked_fill_(hidden_BL[:, None, None], -torch.inf).softmax(-1)
    o_BKrE = torch.matmul(p_BKrL, v_BLKE.transpose(1, 2).to(acc))
    return o_BKrE.reshape(B, H, -1).to(q_BHD.dtype)
