"""Rotary position embedding of queries and keys in one Triton kernel; backward turns the other way.

(a, b) -> (a cos - b sin, b cos + a sin) in float32 for each pair (Su et al. 2021), pairs (i, i + R) or
(2i, 2i + 1); what lies behind the first 2R dimensions of a head is copied.

Memory: q and k are read and written once, forward and backward; cosines and sines (8 R bytes a token) are
read from cache by the heads of a token. 6 operations for a pair: bound by memory. No sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.ops.common import Common

from .triton_blocks import power_of_two, rope_tile


def rope_apply(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.RopeApply`."""
    q_turned, k_turned = _Rotate.apply(q_THD, k_TKD, cos_TR, sin_TR, interleaved)
    return q_turned, k_turned


@triton.jit
def turn_heads(
    x, y, cos, sin, block, T, H, D, R, stride_t, stride_h,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """ROWS heads, counted over tokens and heads together; REST is 0 where whole heads are turned."""
    row = block * ROWS + tl.arange(0, ROWS)
    t, h = (row // H).to(tl.int64), row % H
    r = tl.arange(0, PAIRS)
    inside = (t < T)[:, None] & (r < R)[None, :]
    c = tl.load(cos + t[:, None] * R + r[None, :], mask=inside, other=0.0)
    s = tl.load(sin + t[:, None] * R + r[None, :], mask=inside, other=0.0)
    if BACK:
        s = -s
    if INTERLEAVED:
        first, second = 2 * r, 2 * r + 1
    else:
        first, second = r, r + R
    source = x + (t * stride_t + h * stride_h)[:, None]
    target = y + (row.to(tl.int64) * D)[:, None]
    a = tl.load(source + first[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(target + first[None, :], (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + second[None, :], (b * c + a * s).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        d = 2 * R + tl.arange(0, REST)
        behind = (t < T)[:, None] & (d < D)[None, :]
        tl.store(target + d[None, :], tl.load(source + d[None, :], mask=behind), mask=behind)


@triton.jit
def rope_kernel(
    q, k, q_turned, k_turned, cos, sin, T, H, K, D, R, stride_qt, stride_qh, stride_kt, stride_kh, Q_BLOCKS,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """The first Q_BLOCKS programs turn queries, the others keys."""
    block = tl.program_id(0)
    if block < Q_BLOCKS:
        turn_heads(q, q_turned, cos, sin, block, T, H, D, R, stride_qt, stride_qh,
                   INTERLEAVED, BACK, ROWS, PAIRS, REST)  # fmt: skip
    else:
        turn_heads(k, k_turned, cos, sin, block - Q_BLOCKS, T, K, D, R, stride_kt, stride_kh,
                   INTERLEAVED, BACK, ROWS, PAIRS, REST)  # fmt: skip


def rotate(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool, back: bool
) -> tuple[Tensor, Tensor]:
    """New tensors, turned, or turned back. Not differentiable."""
    q_THD, k_TKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD))
    cos_TR, sin_TR = cos_TR.contiguous(), sin_TR.contiguous()
    T, H, D = q_THD.shape
    K, R = k_TKD.shape[1], cos_TR.shape[1]
    turned = q_THD.new_empty(T, H, D), k_TKD.new_empty(T, K, D)
    rest = D - 2 * R
    tile = rope_tile(R, rest)
    q_blocks, k_blocks = triton.cdiv(T * H, tile.rows), triton.cdiv(T * K, tile.rows)
    if q_blocks + k_blocks:
        rope_kernel[(q_blocks + k_blocks,)](
            q_THD, k_TKD, *turned, cos_TR, sin_TR, T, H, K, D, R, *q_THD.stride()[:2], *k_TKD.stride()[:2],
            q_blocks, INTERLEAVED=interleaved, BACK=back, ROWS=tile.rows, PAIRS=tile.columns,
            REST=power_of_two(rest) if rest else 0, num_warps=tile.warps,
        )  # fmt: skip
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return rotate(q_THD, k_TKD, cos_TR, sin_TR, interleaved=interleaved, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g_q_THD, g_k_TKD = rotate(*grads, *ctx.saved_tensors, interleaved=ctx.interleaved, back=True)
        return g_q_THD, g_k_TKD, None, None, None
