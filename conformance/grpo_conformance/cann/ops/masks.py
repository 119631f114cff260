"""Which keys a query sees, and attention over them."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import MASKS, require, wide

COMPRESSED = 2048
"""Rows and columns of the mask that the sparse modes expand."""


def check_compressed(op: str, mask: Tensor) -> None:
    """The mask of the sparse modes 2, 3 and 4: true above the diagonal, whatever the lengths."""
    square = mask.shape[-2:] == (COMPRESSED, COMPRESSED) and mask.numel() == COMPRESSED**2
    require(
        square, op, f"this sparse_mode takes a mask of {COMPRESSED} x {COMPRESSED}, not {list(mask.shape)}"
    )
    above = torch.triu(torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool), 1)
    flat = mask.reshape(COMPRESSED, COMPRESSED).bool()
    require(torch.equal(flat, above), op, "a compressed mask is true above its diagonal and nowhere else")


def seen(op: str, queries: int, keys: int, mask: Tensor | None, mode: int, before: int, after: int) -> Tensor:
    """bool [queries, keys] (or with leading dimensions of a full mask): true for what takes part.

    `before` and `after` are pre_tokens and next_tokens; the modes 3 and 4 start at the last query and key.
    """
    if mask is None:
        return torch.ones(queries, keys, dtype=torch.bool)
    require(mask.dtype in MASKS, op, f"a mask of bool or uint8, not {mask.dtype}")
    require(mode in (0, 1, 2, 3, 4), op, f"sparse_mode {mode} is not simulated")
    if mode in (0, 1):
        require(mask.shape[-2:] == (queries, keys), op, f"a full mask ends in {queries} x {keys}")
        return ~mask.bool()
    ahead = torch.arange(keys) - torch.arange(queries)[:, None]
    if mode == 2:
        return ahead <= 0
    ahead = ahead - (keys - queries)
    if mode == 3:
        return ahead <= 0
    return (ahead <= after) & (ahead >= -before)


def softmax_attention(
    q_NQD: Tensor, k_KSD: Tensor, v_KSE: Tensor, seen_QS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [N, Q, E], and maximum and sum of the softmax [N, Q, 1], in float32.

    A query that sees nothing gets zeros, as with inner_precise=2.
    """
    groups = q_NQD.shape[0] // max(k_KSD.shape[0], 1)
    k_NSD, v_NSE = wide(k_KSD).repeat_interleave(groups, 0), wide(v_KSE).repeat_interleave(groups, 0)
    scores = (wide(q_NQD) @ k_NSD.transpose(1, 2)) * scale
    scores = scores.masked_fill(~seen_QS, -torch.inf)
    if not scores.shape[2]:
        zeros = scores.new_zeros(*scores.shape[:2], 1)
        return scores.new_zeros(*scores.shape[:2], v_NSE.shape[2]), zeros, zeros
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ v_NSE) / total.clamp_min(torch.finfo(torch.float32).tiny), top, total
