"""mlp.swiglu, linear.dense and linear.packed that treat every row alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference import rowwise
from grpo_core.ops.reference.fused import PlainLinear

from .consistent import borrowed, product
from .mlp import swiglu as gradient


def swiglu(gate_up: Tensor) -> Tensor:
    """See `grpo_core.ops.fused.SwiGLU`."""
    y = borrowed(exact_swiglu, gradient, gate_up)
    assert isinstance(y, Tensor)
    return y


def exact_swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once. Not differentiable."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (rowwise.silu(gate) * up).to(gate_up.dtype)


def linear_dense(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, main_grad_NK: Tensor | None
) -> Tensor:
    """See `grpo_core.ops.fused.DenseLinear`."""
    y_TN: Tensor = _Linear.apply(x_TK, weight_NK, main_grad_NK)
    return y_TN if bias_N is None else y_TN + bias_N


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, main_grad_NK: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.main_grad_NK = main_grad_NK
        return product(x_TK, weight_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TK, weight_NK = ctx.saved_tensors
        g_x_TK = grads[0] @ weight_NK if ctx.needs_input_grad[0] else None
        g_weight_NK = None
        if ctx.main_grad_NK is not None and ctx.needs_input_grad[1]:
            ctx.main_grad_NK.add_(grads[0].float().t() @ x_TK.float())
        elif ctx.needs_input_grad[1]:
            g_weight_NK = grads[0].t() @ x_TK
        return g_x_TK, g_weight_NK, None


class ConsistentLinear(PlainLinear):
    """See `grpo_core.ops.fused.PackedLinear`; works on the tensors given, as `linear_dense` does."""

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Returns x W^T + b, [T, N]."""
        y_TN = product(x_TK, self.weight_NK)
        return y_TN if self.bias_N is None else y_TN + self.bias_N
