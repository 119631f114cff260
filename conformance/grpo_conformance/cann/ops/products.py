"""Gradients for which torch_npu has kernels of its own and torch's CPU has none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import Table


def matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of both factors of `self @ other`, summed where they were broadcast."""
    left = self if self.dim() > 1 else self.unsqueeze(0)
    right = other if other.dim() > 1 else other.unsqueeze(1)
    up = grad if other.dim() > 1 else grad.unsqueeze(-1)
    up = up if self.dim() > 1 else up.unsqueeze(-2)
    g_left = (up @ right.mT).sum_to_size(left.shape).view(self.shape) if mask[0] else None
    g_right = (left.mT @ up).sum_to_size(right.shape).view(other.shape) if mask[1] else None
    return g_left, g_right


def linear_backward(
    self: Tensor, grad_output: Tensor, weight: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight [out, in] and bias."""
    up, rows = grad_output.reshape(-1, weight.shape[0]), self.reshape(-1, weight.shape[1])
    g_self = (up @ weight).view(self.shape) if output_mask[0] else None
    return g_self, up.mT @ rows if output_mask[1] else None, up.sum(0) if output_mask[2] else None


def repeat_interleave_backward(
    grad: Tensor, self: Tensor, repeats: int | Tensor, dim: int | None = None
) -> Tensor:
    """Each element's gradient is the sum over its repetitions."""
    flat = self if dim is not None else self.reshape(-1)
    axis = dim if dim is not None else 0
    source = torch.arange(flat.shape[axis]).repeat_interleave(repeats)
    return torch.zeros_like(flat).index_add_(axis, source, grad).view(self.shape)


TABLE: Table = {
    "matmul_backward": matmul_backward,
    "linear_backward": linear_backward,
    "repeat_interleave_backward_int": repeat_interleave_backward,
    "repeat_interleave_backward_tensor": repeat_interleave_backward,
}
