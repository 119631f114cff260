"""Functions whose value at a place does not depend on the place.

torch computes sigmoid, silu and softplus of the last few elements of a tensor, of strided tensors and of each
thread's end in other instructions than the rest, which may differ in the last bit. Built from exp, log1p and
correctly rounded operations they do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WIDTH = 4096
"""Elements that `row_sum` gives torch at once: longer single rows are shared out over threads."""


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in float32 (float64 for float64), cast back. Differentiable."""
    apply: Any = _Sigmoid.apply
    y: Tensor = apply(x)
    return y


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), the product in x's dtype. Differentiable."""
    return x * sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in float32 (float64 for float64), cast back. Differentiable."""
    apply: Any = _Softplus.apply
    y: Tensor = apply(x)
    return y


def row_sum(x_RN: Tensor) -> Tensor:
    """Sums over the last dimension, [R]; each row alone and always in the same order. Not differentiable."""
    width = x_RN.shape[-1]
    if width <= WIDTH:
        return x_RN.contiguous().sum(-1)
    padded = torch.nn.functional.pad(x_RN, (0, -width % WIDTH))
    return row_sum(padded.view(*x_RN.shape[:-1], -1, WIDTH).sum(-1))


def softmax(x_RN: Tensor) -> Tensor:
    """softmax over the last dimension, in x's dtype. Differentiable."""
    exp_RN = torch.exp(x_RN - x_RN.detach().amax(-1, keepdim=True))
    return exp_RN / exp_RN.sum(-1, keepdim=True)


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = _wide(x)
        small = torch.exp(-wide.abs())
        y = (torch.where(wide >= 0, 1.0, small) / (1 + small)).to(x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        g: Tensor = grads[0] * y * (1 - y)
        return g


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = _wide(x)
        ctx.save_for_backward(x)
        return (wide.clamp_min(0) + torch.log1p(torch.exp(-wide.abs()))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * torch.sigmoid(x)


def _wide(x: Tensor) -> Tensor:
    return x.contiguous().to(torch.promote_types(x.dtype, torch.float32))
