"""A grouped matrix product with its gradients: `npu_grouped_matmul` itself loses them without a word.

torch_npu registers no autograd formula for it: outputs claim to need gradients, and backward leaves None.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

ROWS = 0
"""group_type: groups are rows of x."""
INNER = 2
"""group_type: groups are stretches of the summed dimension."""
COUNTS = 1
"""group_list_type: sizes of groups, not their ends."""


def grouped_linear(rows_RK: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
    """Rows of expert x times weight[x]^T, [R, N]; counts int64 [X] on the device. Differentiable."""
    apply: Any = _GroupedLinear.apply
    y_RN: Tensor = apply(rows_RK, weight_XNK, counts_X)
    return y_RN


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weight_XNK: Tensor, counts_X: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RK, weight_XNK, counts_X)
        if not rows_RK.shape[0]:
            return rows_RK.new_zeros(0, weight_XNK.shape[1])
        return _by_rows(rows_RK, weight_XNK.transpose(1, 2), counts_X)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RK, weight_XNK, counts_X = ctx.saved_tensors
        grad_RN = grads[0].contiguous()
        if not rows_RK.shape[0]:
            return torch.zeros_like(rows_RK), torch.zeros_like(weight_XNK), None
        g_rows = _by_rows(grad_RN, weight_XNK, counts_X) if ctx.needs_input_grad[0] else None
        g_weight = None
        if ctx.needs_input_grad[1]:
            (g_weight,) = torch_npu.npu_grouped_matmul(
                [grad_RN.t()],
                [rows_RK],
                group_list=counts_X,
                split_item=3,
                group_type=INNER,
                group_list_type=COUNTS,
            )
        return g_rows, g_weight, None


def _by_rows(x_RK: Tensor, weight_XKN: Tensor, counts_X: Tensor) -> Tensor:
    (y_RN,) = torch_npu.npu_grouped_matmul(
        [x_RK],
        [weight_XKN],
        group_list=counts_X,
        split_item=2,
        group_type=ROWS,
        group_list_type=COUNTS,
    )
    out: Tensor = y_RN
    return out
