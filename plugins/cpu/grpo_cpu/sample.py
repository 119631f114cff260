"""Token sampling by a two-level inverse of the cumulative distribution: blocks first, then one block.

Rows go through in pieces that stay in cache; only block sums and one block a row are float64, so that no
[B, V] tensor of that kind is made. Filters work on thresholds of the logits; a full sort is made only for
rows whose top-p mass does not fit into the TOP largest logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import pieces

BLOCK = 256
TOP = 1024
PIECE = 1 << 20
"""Logits of a piece: 4 MiB of float32."""


@torch.no_grad()
def sample_token(
    logits_BV: Tensor, u_B: Tensor, *, temperature_B: Tensor, top_k_B: Tensor | None,
    top_p_B: Tensor | None, min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.SampleToken`. A row without a finite largest logit raises
    `FloatingPointError` too."""
    B, V = logits_BV.shape
    ids_B = torch.empty(B, dtype=torch.int64)
    logprob_B, logprob1_B = torch.empty(B), torch.empty(B)
    for part in pieces(B, V, PIECE):
        x_bV = logits_BV[part].float()
        top_b1 = x_bV.amax(-1, keepdim=True)
        if not bool(top_b1.isfinite().all()):
            raise FloatingPointError("a row of logits holds NaN, +inf or nothing but -inf")
        x_bV = x_bV - top_b1
        heat_b = temperature_B[part].double()
        weights_bV = _tempered(x_bV, heat_b)
        filters = [None if f is None else f[part] for f in (top_k_B, top_p_B, min_p_B)]
        keep_bV = _keep(x_bV, weights_bV, heat_b, *filters)
        if keep_bV is not None:
            weights_bV *= keep_bV
        drawn_b, total_b = _invert(weights_bV, u_B[part].double())
        ids_b = torch.where(heat_b == 0, x_bV.argmax(-1), drawn_b)
        at_b = x_bV.gather(1, ids_b[:, None])[:, 0].double()
        hot = at_b / torch.where(heat_b == 0, 1.0, heat_b) - total_b.log()
        ids_B[part] = ids_b
        logprob_B[part] = torch.where(heat_b == 0, 0.0, hot).float()
        plain = bool((heat_b == 1).all()) and keep_bV is None
        logprob1_B[part] = logprob_B[part] if plain else (at_b - x_bV.exp_().sum(-1).double().log()).float()
    return ids_B, logprob_B, logprob1_B


def _tempered(x_bV: Tensor, heat_b: Tensor) -> Tensor:
    """exp(x / T), float32; greedy rows are taken at temperature 1 and not used."""
    if bool(((heat_b == 1) | (heat_b == 0)).all()):
        return x_bV.exp()
    inverse_b = torch.where(heat_b == 0, 1.0, 1 / heat_b)
    return (x_bV * inverse_b[:, None].float()).exp_()


def _invert(weights_bV: Tensor, u_b: Tensor) -> tuple[Tensor, Tensor]:
    """First id whose cumulative weight exceeds u times the total, and the total in float64."""
    b, V = weights_bV.shape
    blocks = -(-V // BLOCK)
    padded_bV = torch.nn.functional.pad(weights_bV, (0, blocks * BLOCK - V))
    blocks_bnK = padded_bV.view(b, blocks, BLOCK)
    cumulative_bn = blocks_bnK.sum(-1).double().cumsum(-1)
    total_b = cumulative_bn[:, -1]
    target_b = u_b * total_b
    # A block without weight is never drawn: its cumulative sum equals that of the block before.
    last_b = torch.where(blocks_bnK.amax(-1) > 0, torch.arange(blocks), 0).amax(-1)
    block_b = torch.minimum((cumulative_bn <= target_b[:, None]).sum(-1), last_b)
    rows = torch.arange(b)
    before_b = torch.where(block_b > 0, cumulative_bn[rows, block_b - 1], 0.0)
    inner_bK = blocks_bnK[rows, block_b]
    inside_b = (inner_bK.double().cumsum(-1) <= (target_b - before_b)[:, None]).sum(-1)
    final_b = torch.where(inner_bK > 0, torch.arange(BLOCK), 0).amax(-1)
    return block_b * BLOCK + torch.minimum(inside_b, final_b), total_b


def _keep(
    x_bV: Tensor, weights_bV: Tensor, heat_b: Tensor, top_k_b: Tensor | None, top_p_b: Tensor | None,
    min_p_b: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Tokens that pass top-k, then top-p, then min-p, bool [b, V]; None when no filter is on."""
    V = x_bV.shape[1]
    keep_bV: Tensor | None = None
    if top_k_b is not None and bool(((top_k_b > 0) & (top_k_b < V)).any()):
        kept_b = torch.where((top_k_b <= 0) | (top_k_b > V), V, top_k_b).long()
        limited_b = kept_b < V
        most = int(kept_b[limited_b].max())
        largest_bk = x_bV.topk(most, -1).values
        border_b1 = largest_bk.gather(1, (kept_b.clamp(max=most) - 1)[:, None])
        keep_bV = (x_bV >= border_b1) | ~limited_b[:, None]
    if top_p_b is not None and bool((top_p_b < 1).any()):
        weights_bV = weights_bV if keep_bV is None else weights_bV * keep_bV
        nucleus_bV = _nucleus(x_bV, weights_bV, top_p_b.double())
        keep_bV = nucleus_bV if keep_bV is None else keep_bV & nucleus_bV
    if min_p_b is not None and bool((min_p_b > 0).any()):
        heat_b = torch.where(heat_b == 0, 1.0, heat_b)
        likely_bV = x_bV >= (min_p_b.double().log() * heat_b)[:, None]
        keep_bV = likely_bV if keep_bV is None else keep_bV & likely_bV
    return keep_bV


def _nucleus(x_bV: Tensor, weights_bV: Tensor, top_p_b: Tensor) -> Tensor:
    """The likeliest tokens, lowest id first among equals, until their mass reaches p of the total."""
    V = x_bV.shape[1]
    goal_b = weights_bV.sum(-1).double() * top_p_b
    count = min(TOP, V)
    sorted_bk = weights_bV.topk(count, -1).values
    if count < V and bool((sorted_bk.sum(-1).double() < goal_b)[top_p_b < 1].any()):
        count, sorted_bk = V, weights_bV.sort(-1, descending=True).values
    cumulative_bk = sorted_bk.double().cumsum(-1)
    kept_b = ((cumulative_bk - sorted_bk) < goal_b[:, None]).sum(-1).clamp(1, count)
    border_b1 = sorted_bk.gather(1, kept_b[:, None] - 1)
    above_bV, equal_bV = weights_bV > border_b1, weights_bV == border_b1
    spare_b = kept_b - above_bV.sum(-1)
    if bool((equal_bV.sum(-1) > spare_b).any()):
        equal_bV &= equal_bV.cumsum(-1) <= spare_b[:, None]
    return above_bV | equal_bV | (top_p_b >= 1)[:, None]
