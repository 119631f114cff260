"""SwiGLU in Triton, forward and backward.

With s = sigmoid(gate) (Shazeer 2020):  y = gate s up,  g_up = g gate s,  g_gate = g up s (1 + gate (1 - s)).
Everything is float32 inside and rounded once; the backward pass computes s again from the input.

Memory, in elements of y: forward reads 2 and writes 1, backward reads 3 and writes 2. Some 10 and 20
operations for each element of y: bound by memory. No sums, so equal bits from equal inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import swiglu_tile


def swiglu(gate_up: Tensor) -> Tensor:
    """See `grpo_core.ops.fused.SwiGLU`."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32 without an exp that overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def swiglu_kernel(
    gate_up, y, N, F, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A tile of y."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (f < F)[None, :]
    at = gate_up + n[:, None] * stride + f[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    result = gate * sigmoid(gate) * up
    tl.store(y + n[:, None] * F + f[None, :], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    g, gate_up, g_gate_up, N, F, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The same tile of both halves of the gradient."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (n < N)[:, None] & (f < F)[None, :]
    at = gate_up + n[:, None] * stride + f[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(g + n[:, None] * F + f[None, :], mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    to = g_gate_up + n[:, None] * (2 * F) + f[None, :]
    g_gate = slope * up * s * (1.0 + gate * (1.0 - s))
    tl.store(to, g_gate.to(g_gate_up.dtype.element_ty), mask=inside)
    tl.store(to + F, (slope * gate * s).to(g_gate_up.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        N, F = rows.shape[0], rows.shape[1] // 2
        y = rows.new_empty(*gate_up.shape[:-1], F)
        tile = swiglu_tile(F)
        if N:
            swiglu_kernel[(triton.cdiv(N, tile.rows), triton.cdiv(F, tile.columns))](
                rows, y, N, F, rows.stride(0), ROWS=tile.rows, COLUMNS=tile.columns, num_warps=tile.warps
            )
        ctx.save_for_backward(rows)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        g = grads[0].contiguous()
        N, F = rows.shape[0], rows.shape[1] // 2
        g_gate_up = rows.new_empty(*g.shape[:-1], 2 * F)
        tile = swiglu_tile(F)
        if N:
            swiglu_backward_kernel[(triton.cdiv(N, tile.rows), triton.cdiv(F, tile.columns))](
                g, rows, g_gate_up, N, F, rows.stride(0), ROWS=tile.rows, COLUMNS=tile.columns,
                num_warps=tile.warps,
            )  # fmt: skip
        return g_gate_up
