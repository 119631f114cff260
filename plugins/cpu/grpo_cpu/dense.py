"""linear.dense in torch: the weight's gradient goes where it belongs without passing through autograd.

torch has no product of bfloat16 operands with a float32 result on a CPU, so they are widened first: the
contract says that the gradient is never rounded to the compute dtype. The C++ pack is there for speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, main_grad_NK: Tensor | None) -> Tensor:
    """See `grpo_core.ops.fused.DenseLinear`."""
    if main_grad_NK is None or not (torch.is_grad_enabled() and weight_NK.requires_grad):
        return torch.nn.functional.linear(x_TK, weight_NK, bias_N)
    y_TN: Tensor = _Dense.apply(x_TK, weight_NK, bias_N, main_grad_NK)
    return y_TN


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, main_grad_NK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.main_grad_NK = main_grad_NK
        return torch.nn.functional.linear(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g_TN,), (x_TK, weight_NK) = grads, ctx.saved_tensors
        wide = ctx.main_grad_NK.dtype
        ctx.main_grad_NK.addmm_(g_TN.t().to(wide), x_TK.to(wide))
        g_x_TK = g_TN @ weight_NK if ctx.needs_input_grad[0] else None
        return g_x_TK, None, g_TN.sum(0) if ctx.needs_input_grad[2] else None, None
