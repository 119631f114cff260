"""gated_delta.* and short_conv.* of the C++ pack, bfloat16 and float32.

A step is one pass over each state. The chunk form keeps its inputs and the state at the start of each chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common

from .native import load
from .native_ops import tracked

_ops = load()


def delta_chunk(
    q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor, g_TK: Tensor, beta_TK: Tensor, *, cu_seqlens: Tensor,
    scale: float, initial_state_SKDE: Tensor | None, final_state: bool, common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """gated_delta.chunk. Raises ValueError for heads that cannot be shared out and for other ends than
    cumulative lengths."""
    inputs = q_THD, k_THD, v_TKE, g_TK, beta_TK
    if tracked(*inputs, initial_state_SKDE):
        o_TKE, last_SKDE = _Chunk.apply(*inputs, initial_state_SKDE, cu_seqlens, scale, final_state)
    else:
        o_TKE, last_SKDE, _ = _ops.delta_chunk(
            *inputs, cu_seqlens, scale, initial_state_SKDE, final_state, False
        )
    return o_TKE, last_SKDE if final_state else None


class _Chunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, initial, ends, scale, final_state = args
        o_TKE, last_SKDE, before = _ops.delta_chunk(*inputs, ends, scale, initial, final_state, True)
        ctx.save_for_backward(*inputs, ends, before)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.final_state = scale, final_state
        return o_TKE, last_SKDE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, ends, before = ctx.saved_tensors
        d_o, d_last = grads
        d_o = torch.zeros_like(inputs[2]) if d_o is None else d_o
        wants_start = ctx.needs_input_grad[5]
        *d_inputs, d_start = _ops.delta_chunk_backward(
            *inputs, ends, ctx.scale, before, d_o, d_last if ctx.final_state else None, wants_start
        )
        return *d_inputs, d_start if wants_start else None, None, None, None


def conv_varlen(
    x_TC: Tensor, w_CW: Tensor, *, cu_seqlens: Tensor, initial_state_SCW: Tensor | None, final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """short_conv.varlen. Raises ValueError for a width above 16 and for ends that are not cumulative."""
    if tracked(x_TC, w_CW, initial_state_SCW):
        y_TC, last_SCW = _Conv.apply(x_TC, w_CW, initial_state_SCW, cu_seqlens, final_state)
    else:
        y_TC, last_SCW = _ops.conv_varlen(x_TC, w_CW, cu_seqlens, initial_state_SCW, final_state)
    return y_TC, last_SCW if final_state else None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, initial: Tensor | None, ends: Tensor, final_state: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w, ends, initial)
        ctx.set_materialize_grads(False)
        ctx.final_state = final_state
        y_TC, last_SCW = _ops.conv_varlen(x, w, ends, initial, final_state)
        return y_TC, last_SCW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, ends, initial = ctx.saved_tensors
        dy = torch.zeros_like(x) if grads[0] is None else grads[0]
        dx, dw, d_start = _ops.conv_varlen_backward(
            x, w, ends, initial, dy, grads[1] if ctx.final_state else None
        )
        if initial is None or not ctx.needs_input_grad[2]:
            return dx, dw, None, None, None
        return dx, dw, d_start.to(initial.dtype), None, None


def delta_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """gated_delta.step. Raises IndexError for a slot that the states do not have."""
    return _ops.delta_step(q_BHD, k_BHD, v_BKE, g_BK, beta_BK, state_NKDE, slots, scale)


def conv_step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """short_conv.step. Raises IndexError for a slot that the windows do not have."""
    return _ops.conv_step(x_BC, w_CW, state_NCW, slots)
