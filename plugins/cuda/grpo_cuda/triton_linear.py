"""Dense linear layers whose weight's gradient is added to float32 in one product.

Forward and the input's gradient are cuBLAS products. The weight's gradient g^T x goes straight into the
main gradient (Megatron-core's gradient_accumulation_fusion): 2 T N K operations, and the main gradient is
read and written once, 8 N K bytes. Through torch it would be a product of float32 operands, which is some ten
times slower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_product import add_product, dense_rows


def linear_dense(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, main_grad_NK: Tensor | None
) -> Tensor:
    """See `grpo_core.ops.fused.DenseLinear`."""
    if main_grad_NK is None:
        return torch.nn.functional.linear(x_TK, weight_NK, bias_N)
    apply: Any = _AccumulatingLinear.apply
    y_TN: Tensor = apply(x_TK, weight_NK, bias_N, main_grad_NK)
    return y_TN


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, main_grad_NK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.main_grad_NK = main_grad_NK
        return torch.nn.functional.linear(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        (g_TN,) = grads
        if ctx.needs_input_grad[1] and x_TK.shape[0]:
            if g_TN.dtype == torch.float32:
                ctx.main_grad_NK.addmm_(g_TN.t(), x_TK)
            else:
                add_product(g_TN.t(), dense_rows(x_TK), ctx.main_grad_NK, add=True)
        g_x_TK = g_TN @ weight_NK if ctx.needs_input_grad[0] else None
        g_bias_N = g_TN.sum(0) if ctx.needs_input_grad[2] else None
        return g_x_TK, None, g_bias_N, None
