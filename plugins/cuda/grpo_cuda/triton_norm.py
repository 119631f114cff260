"""RMS norm in Triton, forward and backward, with the residual added on the way.

With n = x r and r = 1 / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019):
    y = n w        g_x = r (g w - n mean(g w n))        g_w = sum over rows of g n

Memory, in elements of x: forward reads x and writes y (with a residual it also reads that and writes their
sum); backward reads g and x and writes g_x (with a residual it also reads the sum's gradient), so 2 or 4 and
3 or 4 times the size of x. Some 10 operations for each element: bound by memory.

Sums over a row are trees of one shape for one hidden size. The weight's gradient is added up by `STRIPES`
programs over their own rows in order, and then over the programs: no atomics, equal bits from equal inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import norm_tile, stripe


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Any:
    """See `grpo_core.ops.fused.RmsNorm`."""
    y, total = _RmsNorm.apply(x, w, residual, eps, zero_centered)
    return y if residual is None else (y, total)


@triton.jit
def norm_kernel(
    x, residual, w, y, total, rstd, N, C, stride_x, stride_r, eps,
    ADD: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of y, their sums with the residual where ADD, and 1 / sqrt(mean square + eps)."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (c < C)[None, :]
    value = tl.load(x + n[:, None] * stride_x + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + n[:, None] * stride_r + c[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + n[:, None] * C + c[None, :], rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value * value, 1) / C
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    tl.store(rstd + n, inverse, mask=n < N)
    scale = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)
    if CENTRED:
        scale += 1.0
    normed = (value * inverse[:, None]).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + n[:, None] * C + c[None, :], (normed * scale[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    g, g_total, x, w, rstd, g_x, g_w, N, C, stride_x, STRIPE,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """STRIPE rows of g_x, and their sum of g n as a row of g_w where WEIGHT."""
    c = tl.arange(0, COLUMNS)
    scale = tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)
    if CENTRED:
        scale += 1.0
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * STRIPE
    for start in range(0, STRIPE, ROWS):
        n = first + start + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (c < C)[None, :]
        at = n[:, None] * C + c[None, :]
        slope = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + n[:, None] * stride_x + c[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + n, mask=n < N, other=0.0)
        normed = value * inverse[:, None]
        if WEIGHT:
            sums += slope * normed
        slope = slope * scale[None, :]
        mean = tl.sum(slope * normed, 1) / C
        result = (slope - normed * mean[:, None]) * inverse[:, None]
        if ADD:
            result += tl.load(g_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(g_x + at, result.to(g_x.dtype.element_ty), mask=inside)
    if WEIGHT:
        tl.store(g_w + tl.program_id(0) * C + c, tl.sum(sums, 0), mask=c < C)


def _matrix(x: Tensor) -> Tensor:
    """[rows, C] whose last dimension is dense; a view where there is one."""
    matrix = x.reshape(-1, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] == 1 else matrix.contiguous()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, residual: Tensor | None, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor | None]:
        x_NC, w = _matrix(x), w.contiguous()
        r_NC = x_NC if residual is None else _matrix(residual)
        N, C = x_NC.shape
        y_NC, rstd_N = x_NC.new_empty(N, C), x_NC.new_empty(N, dtype=torch.float32)
        total_NC = y_NC if residual is None else torch.empty_like(y_NC)
        tile = norm_tile(C)
        if N:
            norm_kernel[(triton.cdiv(N, tile.rows),)](
                x_NC, r_NC, w, y_NC, total_NC, rstd_N, N, C, x_NC.stride(0), r_NC.stride(0), eps,
                ADD=residual is not None, CENTRED=zero_centered, ROWS=tile.rows, COLUMNS=tile.columns,
                num_warps=tile.warps,
            )  # fmt: skip
        total = None if residual is None else total_NC.view(x.shape)
        ctx.save_for_backward(x_NC if total is None else total, w, rstd_N)
        ctx.zero_centered, ctx.added = zero_centered, residual is not None
        ctx.set_materialize_grads(False)
        return y_NC.view(x.shape), total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, w, rstd_N = ctx.saved_tensors
        x_NC = kept.view(-1, kept.shape[-1]) if ctx.added else kept
        g_y, g_total = grads
        if g_y is None:
            return g_total, None, g_total if ctx.added else None, None, None
        shape, (N, C), tile = g_y.shape, x_NC.shape, norm_tile(x_NC.shape[1])
        g_NC = g_y.reshape(N, C).contiguous()
        added_NC = g_NC if g_total is None else g_total.reshape(N, C).contiguous()
        rows = max(stripe(N, tile.rows), 1)
        count = triton.cdiv(N, rows)
        g_x_NC = torch.empty_like(g_NC)
        weighted = ctx.needs_input_grad[1]
        g_w_SC = x_NC.new_empty(count if weighted else 0, C, dtype=torch.float32)
        if N:
            norm_backward_kernel[(count,)](
                g_NC, added_NC, x_NC, w, rstd_N, g_x_NC, g_w_SC, N, C, x_NC.stride(0), rows,
                ADD=g_total is not None, WEIGHT=weighted, CENTRED=ctx.zero_centered, ROWS=tile.rows,
                COLUMNS=tile.columns, num_warps=tile.warps,
            )  # fmt: skip
        g_x = g_x_NC.view(shape)
        g_w = g_w_SC.sum(0).to(w.dtype) if weighted else None
        return g_x, g_w, g_x if ctx.added else None, None, None
