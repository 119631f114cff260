"""Packed attention for training, as batched matrix products over tiles, forward and backward.

For sequences of some dozens to some thousands of tokens this beats torch's fused CPU attention, whose
backward pass is slow on short sequences. Query heads of one key head are rows of the same product, so
keys and values are never repeated. Scores of bfloat16 operands are float32: rounded ones are off by a quarter
where all are near 100, as with the biased keys of some models.
The backward pass computes the probabilities again: what is kept is q, k and v.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds, parent_list

from .tiles import Tile, TilePlan, plan_tiles


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)
    return _attend(q_THD, k_TKD, v_TKE, ends, [-1] * (len(ends) - 1), scale, causal, window)


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)
    return _attend(
        q_THD, k_TKD, v_TKE, ends, parent_list(parents, len(ends) - 1, common), scale, True, window
    )


def _attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, ends: list[int], parents: list[int], scale: float,
    causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    H, K = q_THD.shape[1], k_TKD.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads cannot be shared out over {K} key/value heads")
    plan = plan_tiles(tuple(ends), tuple(parents), H, H // K, causal, window, q_THD.dtype)
    result: Tensor = _TiledAttention.apply(q_THD, k_TKD, v_TKE, plan, scale)
    return result


def _queries(x_THD: Tensor, tile: Tile, K: int, *, zero_pads: bool = False) -> Tensor:
    """Rows of a tile as [n * K, Q * rep, D]."""
    H, D = x_THD.shape[1:]
    rows_THD = x_THD.index_select(0, tile.query_rows)
    if zero_pads and tile.pads is not None:
        rows_THD.index_fill_(0, tile.pads, 0)
    x_nQKrD = rows_THD.view(tile.n, tile.Q, K, H // K, D)
    return x_nQKrD.transpose(1, 2).reshape(tile.n * K, tile.Q * (H // K), D)


def _keys(x_TKD: Tensor, tile: Tile) -> Tensor:
    """Keys or values of a tile as [n * K, P + S, D], the parent's first."""
    K, D = x_TKD.shape[1:]
    own_nKSD = x_TKD.index_select(0, tile.key_rows).view(tile.n, tile.S, K, D).transpose(1, 2)
    if tile.P == 0:
        return own_nKSD.reshape(tile.n * K, tile.S, D)
    shared_nKPD = x_TKD[tile.parent].transpose(0, 1).expand(tile.n, K, tile.P, D)
    return torch.cat([shared_nKPD, own_nKSD], dim=2).view(tile.n * K, tile.P + tile.S, D)


def _probabilities(q_bMD: Tensor, k_bSD: Tensor, tile: Tile, scale: float) -> Tensor:
    acc = torch.promote_types(q_bMD.dtype, torch.float32)
    k_bDS = k_bSD.to(acc).transpose(1, 2)
    scores_bMS = torch.baddbmm(tile.mask_MS.to(acc), q_bMD.to(acc), k_bDS, alpha=scale)
    return torch.softmax(scores_bMS, -1).to(q_bMD.dtype)


def _rows(x_bMD: Tensor, tile: Tile, H: int) -> Tensor:
    """[n * K, Q * rep, D] back as rows [n * Q, H, D]."""
    K = x_bMD.shape[0] // tile.n
    x_nKQW = x_bMD.view(tile.n, K, tile.Q, H // K * x_bMD.shape[2])
    return x_nKQW.transpose(1, 2).reshape(tile.n * tile.Q, H, x_bMD.shape[2])


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, plan: TilePlan, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q_THD, k_TKD, v_TKE)
        ctx.plan, ctx.scale = plan, scale
        H, K = q_THD.shape[1], k_TKD.shape[1]
        outputs = [q_THD.new_empty(0, H, v_TKE.shape[2])]
        for tile in plan.tiles:
            p_bMS = _probabilities(_queries(q_THD, tile, K), _keys(k_TKD, tile), tile, scale)
            outputs.append(_rows(torch.bmm(p_bMS, _keys(v_TKE, tile)), tile, H))
        return torch.cat(outputs).index_select(0, plan.query_at)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_THD, k_TKD, v_TKE = ctx.saved_tensors
        plan, scale, H, K = ctx.plan, ctx.scale, q_THD.shape[1], k_TKD.shape[1]
        g_queries = [q_THD.new_empty(0, *q_THD.shape[1:])]
        g_keys, g_values = KeyGrads(k_TKD), KeyGrads(v_TKE)
        for tile in plan.tiles:
            q_bMD, k_bSD = _queries(q_THD, tile, K), _keys(k_TKD, tile)
            p_bMS = _probabilities(q_bMD, k_bSD, tile, scale)
            g_bME = _queries(grads[0], tile, K, zero_pads=True)
            g_values.add(torch.bmm(p_bMS.transpose(1, 2), g_bME), tile)
            g_p_bMS = torch.bmm(g_bME, _keys(v_TKE, tile).transpose(1, 2))
            g_s_bMS = torch._softmax_backward_data(g_p_bMS, p_bMS, -1, p_bMS.dtype)
            g_queries.append(_rows(torch.bmm(g_s_bMS, k_bSD).mul_(scale), tile, H))
            g_keys.add(torch.bmm(g_s_bMS.transpose(1, 2), q_bMD).mul_(scale), tile)
        g_q_THD = torch.cat(g_queries).index_select(0, plan.query_at)
        return g_q_THD, g_keys.total(plan), g_values.total(plan), None, None


class KeyGrads:
    """Gradients of keys or values, gathered over tiles; sums over tiles are float32 or wider."""

    def __init__(self, like_TKD: Tensor) -> None:
        self.like_TKD = like_TKD
        self.acc = torch.promote_types(like_TKD.dtype, torch.float32)
        self.own: list[Tensor] = []
        self.slices: list[tuple[slice, Tensor]] = []

    def add(self, g_bSD: Tensor, tile: Tile) -> None:
        """Take the gradient [n * K, P + S, D] of a tile."""
        K, D = self.like_TKD.shape[1:]
        g_nKSD = g_bSD.view(tile.n, K, tile.P + tile.S, D)
        if tile.P:
            self.slices.append((tile.parent, g_nKSD[:, :, : tile.P].sum(0, dtype=self.acc).transpose(0, 1)))
        own_nSKD = g_nKSD[:, :, tile.P :].transpose(1, 2)
        if tile.block is None:
            self.own.append(own_nSKD.reshape(tile.n * tile.S, K, D))
        else:
            self.slices.append((tile.block, own_nSKD[0].to(self.acc)))

    def total(self, plan: TilePlan) -> Tensor:
        """The sum, [T, K, D] in the dtype of the keys."""
        nothing_1KD = self.like_TKD.new_zeros(1, *self.like_TKD.shape[1:])
        total_TKD = torch.cat([*self.own, nothing_1KD]).index_select(0, plan.key_at)
        if self.slices:
            total_TKD = total_TKD.to(self.acc)
            for part, g_PKD in self.slices:
                total_TKD[part] += g_PKD
        return total_TKD.to(self.like_TKD.dtype)
