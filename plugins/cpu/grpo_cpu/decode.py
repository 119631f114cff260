"""attention.prefill and attention.decode in torch over `SharedCache`.

Decoding takes the products with a shared prefix once for all sequences that share it; scores of prefix and
own keys are then one softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds

from .cache import DecodePlan, SharedLayer

SCORES = 1 << 22
"""Most scores of a prefill's block of queries."""


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`."""
    layer = _shared(cache)
    T, H, D = q_THD.shape
    K = layer.table.heads
    ends = bounds(cu_seqlens_q, T, common)
    o_THE = q_THD.new_empty(T, H, layer.v_RE.shape[1])
    acc = torch.promote_types(q_THD.dtype, torch.float32)
    for index, (slot, length) in enumerate(zip(slots.tolist(), seqlens_k.tolist(), strict=True)):
        start, end = ends[index], ends[index + 1]
        if start == end:
            continue
        at_S = torch.arange(length)
        rows = layer.table.pool_rows(layer.table.rows(torch.full_like(at_S, slot), at_S))
        k_KSD, v_KSE = (pool.index_select(0, rows).view(K, length, -1) for pool in (layer.k_RD, layer.v_RE))
        size = max(1, SCORES // (H * max(length, 1)))
        for first in range(start, end, size):
            block = slice(first, min(first + size, end))
            Q = block.stop - block.start
            q_KMD = q_THD[block].view(Q, K, H // K, D).transpose(0, 1).reshape(K, Q * (H // K), D)
            back_QS = torch.arange(block.start, block.stop)[:, None] + (length - end) - at_S
            hidden_QS = (back_QS < 0) if window is None else (back_QS < 0) | (back_QS >= window)
            mask_QS = torch.zeros(hidden_QS.shape, dtype=acc).masked_fill_(hidden_QS, -torch.inf)
            mask_MS = mask_QS.repeat_interleave(H // K, 0)
            scores_KMS = torch.baddbmm(mask_MS, q_KMD.to(acc), k_KSD.to(acc).transpose(1, 2), alpha=scale)
            p_KMS = torch.softmax(scores_KMS, -1).to(q_THD.dtype)
            o_KQW = torch.bmm(p_KMS, v_KSE).view(K, Q, -1)
            o_THE[block] = o_KQW.transpose(0, 1).reshape(Q, H, -1)
    return o_THE


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`."""
    layer = _shared(cache)
    B, H, D = q_BHD.shape
    K = layer.table.heads
    rep = H // K
    if B == 0:
        return q_BHD.new_empty(0, H, layer.v_RE.shape[1])
    plan = layer.table.decode_plan(slots, seqlens_k)
    q_KBrD = q_BHD.view(B, K, rep, D).transpose(0, 1).to(torch.promote_types(q_BHD.dtype, torch.float32))
    q_KBrD = q_KBrD.contiguous()
    own_KBrS = _own(q_KBrD, layer.k_RD, plan, transpose=True)
    parts = [_prefix(q_KBrD, layer.k_RD, plan, transpose=True)] if plan.N else []
    scores_KBrS = torch.cat([*parts, own_KBrS], -1)
    scores_KBrS.mul_(scale).masked_fill_(plan.hidden(window)[:, None], -torch.inf)
    p_KBrS = torch.softmax(scores_KBrS, -1).to(q_BHD.dtype)
    o_KBrE = _own(p_KBrS[..., plan.P :].contiguous(), layer.v_RE, plan, transpose=False)
    if plan.N:
        shared_KBrE = _prefix(p_KBrS[..., : plan.P].contiguous(), layer.v_RE, plan, transpose=False)
        o_KBrE = o_KBrE + shared_KBrE.masked_fill_(plan.prefix_B.eq(0)[:, None, None], 0)
    return o_KBrE.transpose(0, 1).reshape(B, H, -1)


def _own(x_KBrX: Tensor, pool_RD: Tensor, plan: DecodePlan, *, transpose: bool) -> Tensor:
    """Products with the keys (or values) of each sequence's own, [K, B, rep, ...]."""
    K, B, rep, X = x_KBrX.shape
    rows_bSD = pool_RD.index_select(0, plan.own_rows).view(K * B, plan.S, pool_RD.shape[1]).to(x_KBrX.dtype)
    return torch.bmm(x_KBrX.view(K * B, rep, X), rows_bSD.mT if transpose else rows_bSD).view(K, B, rep, -1)


def _prefix(x_KBrX: Tensor, pool_RD: Tensor, plan: DecodePlan, *, transpose: bool) -> Tensor:
    """Products with the shared prefixes, each taken once; [K, B, rep, ...]. Sequences without one get
    what the first member got, which the caller hides."""
    K, _, rep, X = x_KBrX.shape
    rows_nPD = pool_RD.index_select(0, plan.prefix_rows).view(K * plan.N, plan.P, pool_RD.shape[1])
    rows_nPD = rows_nPD.to(x_KBrX.dtype)
    x_nMX = x_KBrX.index_select(1, plan.members).view(K * plan.N, plan.M * rep, X)
    y_KMrY = torch.bmm(x_nMX, rows_nPD.mT if transpose else rows_nPD).view(K, plan.N * plan.M, rep, -1)
    return y_KMrY.index_select(1, plan.member_at)


def _shared(cache: LayerCache) -> SharedLayer:
    if not isinstance(cache, SharedLayer):
        raise TypeError(f"this attention reads layers of SharedCache, not {type(cache).__name__}")
    return cache
