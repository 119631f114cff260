"""Token sampling that reads the logits once: sums of pieces of a row, then one piece of it again.

A first kernel leaves of each PIECE of a row its largest logit, the sums of exp((z - largest) / temperature)
and of exp(z - largest). Which piece holds u is decided in float64 over these few sums; a second kernel
inverts the cumulative distribution inside of that piece, in float64 as well.

Memory: 2 bytes for each bfloat16 logit, and some 10 KiB a row. Bound by memory; plain torch makes a dozen
passes over float64. For top-k, top-p and min-p see `triton_sample_filters`. Each sum has one program and one
order, whatever the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import power_of_two
from .triton_sample_filters import filtered_kernel

PIECE = 4096
"""Logits of one program at most: 32 for each thread of 4 warps."""
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Last bits of a float32 that are always 0 in numbers of a dtype."""


@torch.no_grad()
def sample_token(
    logits_BV: Tensor, u_B: Tensor, *, temperature_B: Tensor, top_k_B: Tensor | None,
    top_p_B: Tensor | None, min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.SampleToken`. A row without a finite largest logit raises
    `FloatingPointError` too; that check waits for the device."""
    logits_BV = logits_BV if logits_BV.stride(-1) == 1 else logits_BV.contiguous()
    B, V = logits_BV.shape
    cold_B = temperature_B == 0
    heat_B = torch.where(cold_B, 1.0, temperature_B).float().contiguous()
    piece = min(PIECE, power_of_two(V))
    count = triton.cdiv(V, piece)
    top_SB, hot_SB, plain_SB = (heat_B.new_empty(count, B) for _ in range(3))
    first_SB = torch.empty(count, B, dtype=torch.int64, device=logits_BV.device)
    if not B:
        return first_SB.new_empty(0), heat_B.new_empty(0), heat_B.new_empty(0)
    sums_kernel[(B, count)](
        logits_BV, heat_B, top_SB, hot_SB, plain_SB, first_SB, B, V, logits_BV.stride(0), PIECE=piece,
        num_warps=4,
    )  # fmt: skip
    top_B = top_SB.amax(0)
    if not bool(top_B.isfinite().all()):
        raise FloatingPointError("a row of logits holds NaN, +inf or nothing but -inf")
    filters = (top_k_B, top_p_B, min_p_B)
    if any(given is not None for given in filters):
        ids_B, total_B = _filtered(logits_BV, u_B, heat_B, top_B, *filters, piece)
    else:
        ids_B, total_B = _plain(logits_BV, u_B, heat_B, top_SB, top_B, hot_SB, piece)
    # Of pieces with equal tops the first one has the lowest id.
    ids_B = torch.where(cold_B, torch.where(top_SB == top_B, first_SB, V).amin(0), ids_B)
    at_B = logits_BV.gather(1, ids_B[:, None])[:, 0].double() - top_B.double()
    shrink_SB = (top_SB.double() - top_B.double()).exp()
    plain_B = at_B - (plain_SB.double() * shrink_SB).sum(0).log()
    hot_B = at_B / heat_B.double() - total_B.log()
    return ids_B, torch.where(cold_B, 0.0, hot_B).float(), plain_B.float()


def _plain(
    logits_BV: Tensor, u_B: Tensor, heat_B: Tensor, top_SB: Tensor, top_B: Tensor, hot_SB: Tensor, piece: int
) -> tuple[Tensor, Tensor]:
    """(tokens, sums of exp((z - top) / temperature) in float64)."""
    shrink_SB = ((top_SB.double() - top_B.double()) / heat_B.double()).exp()
    piece_B, rest_B, total_B = _piece(hot_SB.double() * shrink_SB, u_B.double())
    one = piece_B[None]
    ids_B = torch.empty_like(piece_B)
    pick_kernel[(len(piece_B),)](
        logits_BV, heat_B, top_SB.gather(0, one)[0], piece_B, rest_B / shrink_SB.gather(0, one)[0], ids_B,
        logits_BV.shape[1], logits_BV.stride(0), PIECE=piece, num_warps=4,
    )  # fmt: skip
    return ids_B, total_B


def _filtered(
    logits_BV: Tensor, u_B: Tensor, heat_B: Tensor, top_B: Tensor, top_k_B: Tensor | None,
    top_p_B: Tensor | None, min_p_B: Tensor | None, piece: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same of the tokens that pass the filters."""
    B, V = logits_BV.shape
    ids_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    total_B = torch.empty(B, dtype=torch.float64, device=logits_BV.device)
    least_B = None if min_p_B is None else min_p_B.double().log()
    filters = [total_B if x is None else x.contiguous() for x in (top_k_B, top_p_B, least_B)]
    filtered_kernel[(B,)](
        logits_BV, heat_B, top_B, u_B.contiguous(), *filters, ids_B, total_B, V, logits_BV.stride(0),
        TOP_K=top_k_B is not None, TOP_P=top_p_B is not None, MIN_P=min_p_B is not None,
        SHIFT=SHIFTS[logits_BV.dtype], PIECE=piece, num_warps=4,
    )  # fmt: skip
    return ids_B, total_B


def _piece(weights_SB: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the piece that holds u, what of the target is left for it, the total), the last two float64."""
    cumulative_SB = weights_SB.cumsum(0)
    total_B = cumulative_SB[-1]
    target_B = u_B * total_B
    # A piece without weight is never drawn.
    last_B = (cumulative_SB < total_B).sum(0)
    piece_B = torch.minimum((cumulative_SB <= target_B).sum(0), last_B)
    before_B = torch.where(piece_B > 0, cumulative_SB.gather(0, (piece_B - 1).clamp_min(0)[None])[0], 0.0)
    return piece_B, target_B - before_B, total_B


@triton.jit
def sums_kernel(
    logits, heat_B, top_SB, hot_SB, plain_SB, first_SB, B, V, stride, PIECE: tl.constexpr
):  # fmt: skip
    """Of one piece of one row: largest logit (NaN where one is), the two sums, the first largest's id."""
    row, piece = tl.program_id(0), tl.program_id(1)
    v = piece * PIECE + tl.arange(0, PIECE)
    z = tl.load(logits + row.to(tl.int64) * stride + v, mask=v < V, other=float("-inf")).to(tl.float32)
    top = tl.max(z, 0)
    heat = tl.load(heat_B + row)
    below = tl.where(z == float("-inf"), float("-inf"), z - top)
    at = piece.to(tl.int64) * B + row
    tl.store(hot_SB + at, tl.sum(tl.exp(below / heat), 0))
    tl.store(plain_SB + at, tl.sum(tl.exp(below), 0))
    tl.store(first_SB + at, tl.min(tl.where(z == top, v, V), 0))
    broken = tl.max((z != z).to(tl.int32), 0)
    tl.store(top_SB + at, tl.where(broken > 0, float("nan"), top))


@triton.jit
def pick_kernel(logits, heat_B, top_B, piece_B, rest_B, ids_B, V, stride, PIECE: tl.constexpr):
    """The first id of the piece whose cumulative weight exceeds the rest; the last with weight at the end."""
    row = tl.program_id(0)
    first = tl.load(piece_B + row) * PIECE
    v = tl.arange(0, PIECE)
    z = tl.load(logits + row.to(tl.int64) * stride + first + v, mask=first + v < V, other=float("-inf"))
    below = z.to(tl.float32) - tl.load(top_B + row)
    weight = tl.exp(below / tl.load(heat_B + row))
    passed = tl.cumsum(weight.to(tl.float64), 0) <= tl.load(rest_B + row)
    inside = tl.sum(passed.to(tl.int32), 0)
    last = tl.max(tl.where(weight > 0, v, 0), 0)
    tl.store(ids_B + row, first + tl.minimum(inside, last))
