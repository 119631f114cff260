"""Triton kernels of a mixture of experts: grouped products and the sums that bring rows back to tokens.

All sums are float32 and in a fixed order, one program for each tile of the result: equal inputs give equal
bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
    x, w, y, expert_of, first_of, last_of, X, N, K, x_row, x_depth, w_expert, w_depth, w_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one expert times its weight: y[r, n] = sum_k x[r, k] w[expert, k, n]."""
    tile = tl.program_id(0)
    expert = tl.load(expert_of + tile).to(tl.int64)
    if expert < X:
        r = tl.load(first_of + tile).to(tl.int64) + tl.arange(0, ROWS)
        in_rows = r < tl.load(last_of + tile)
        n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_columns = n < N
        x_at = x + r[:, None] * x_row
        w_at = w + expert * w_expert + n[None, :] * w_column
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for at in range(0, K, DEPTH):
            k = at + tl.arange(0, DEPTH)
            in_depth = k < K
            left = tl.load(x_at + k[None, :] * x_depth, mask=in_rows[:, None] & in_depth[None, :], other=0.0)
            right = tl.load(
                w_at + k[:, None] * w_depth, mask=in_depth[:, None] & in_columns[None, :],
                other=0.0,
            )  # fmt: skip
            total = tl.dot(left, right, total, input_precision=PRECISION)
        inside = in_rows[:, None] & in_columns[None, :]
        tl.store(y + r[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def weights_kernel(
    g, x, out, ends, N, K, g_row, g_column, x_row, x_column, out_expert, out_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ADD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one expert's weight: out[expert, n, k] (+)= sum over its rows of g[r, n] x[r, k]."""
    expert = tl.program_id(2).to(tl.int64)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    last = tl.load(ends + expert).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_n, in_k = n < N, k < K
    inside = in_n[:, None] & in_k[None, :]
    to = out + expert * out_expert + n[:, None] * out_row + k[None, :]
    if ADD:
        if last > first:
            total = sum_of_rows(g, x, first, last, n, k, in_n, in_k, g_row, g_column, x_row, x_column,
                                ROWS, COLUMNS, DEPTH, PRECISION)  # fmt: skip
            tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)
    else:
        total = sum_of_rows(g, x, first, last, n, k, in_n, in_k, g_row, g_column, x_row, x_column, ROWS,
                            COLUMNS, DEPTH, PRECISION)  # fmt: skip
        tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_of_rows(
    g, x, first, last, n, k, in_n, in_k, g_row, g_column, x_row, x_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum over rows [first, last) of g[r, n] x[r, k], float32 [ROWS, COLUMNS]."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(first, last, DEPTH):
        r = at + tl.arange(0, DEPTH)
        in_rows = r < last
        left = tl.load(
            g + r[None, :] * g_row + n[:, None] * g_column, mask=in_n[:, None] & in_rows[None, :], other=0.0
        )
        right = tl.load(
            x + r[:, None] * x_row + k[None, :] * x_column, mask=in_rows[:, None] & in_k[None, :], other=0.0
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def weigh_kernel(rows, weights, places, y, C, TOP_K, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):
    """A piece of a token: y[t, c] = sum_j weights[t, j] rows[places[t, j], c]."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < C
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for j in range(TOP_K):
        row = tl.load(places + t * TOP_K + j).to(tl.int64)
        part = tl.load(rows + row * C + c, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weights + t * TOP_K + j).to(tl.float32)
        total += part
    tl.store(y + t * C + c, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def slopes_kernel(
    g, rows, weights, order, g_rows, g_weights, C, TOP_K, OF_ROWS: tl.constexpr, OF_WEIGHTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row: g_row = weight g[token], g_weight = <g[token], row>."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + row).to(tl.int64)
    weight = tl.load(weights + pair).to(tl.float32)
    from_token, from_row = g + pair // TOP_K * C, rows + row * C
    product = tl.zeros((COLUMNS,), dtype=tl.float32)
    for at in range(0, C, COLUMNS):
        c = at + tl.arange(0, COLUMNS)
        inside = c < C
        slope = tl.load(from_token + c, mask=inside, other=0.0).to(tl.float32)
        if OF_WEIGHTS:
            product += slope * tl.load(from_row + c, mask=inside, other=0.0).to(tl.float32)
        if OF_ROWS:
            tl.store(g_rows + row * C + c, (slope * weight).to(g_rows.dtype.element_ty), mask=inside)
    if OF_WEIGHTS:
        tl.store(g_weights + row, tl.sum(product))
