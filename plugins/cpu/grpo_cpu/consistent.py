"""What all consistent offers are made of: products over a fixed number of rows, and borrowed gradients.

A matrix product of a fixed shape treats every row alike: the bits of a row do not depend on where in the
block it stands or what stands beside it. So rows go through in blocks of ROWS, the last one filled up with
zeros. Sizes that are no multiple of LANES take other instructions for some rows, and are filled up as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

ROWS = 32
"""Rows of a product."""
LANES = 16
"""Inner and outer sizes of a product are multiples of this."""

Results = Tensor | tuple[Tensor, ...]


def filled(x: Tensor, *, rows: int = 1, columns: int = 1) -> Tensor:
    """x with zeros behind its last two dimensions, up to multiples; contiguous."""
    below, right = -x.shape[-2] % rows, -x.shape[-1] % columns
    return pad(x, (0, right, 0, below)) if below or right else x.contiguous()


def product(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """x w^T [T, N], in x's dtype. Not differentiable."""
    T, N = x_TK.shape[0], w_NK.shape[0]
    w_KN = filled(w_NK, rows=LANES, columns=LANES).t()
    y_TN = x_TK.new_empty(T, N)
    for start in range(0, T, ROWS):
        count = min(ROWS, T - start)
        block_RK = filled(x_TK[start : start + count], rows=ROWS, columns=LANES)
        y_TN[start : start + count] = torch.mm(block_RK, w_KN)[:count, :N]
    return y_TN


def by_head(x_THA: Tensor, w_HBA: Tensor) -> Tensor:
    """x[:, h] w[h]^T for each head, [T, H, B]. Not differentiable."""
    (T, H, _), B = x_THA.shape, w_HBA.shape[1]
    w_HAB = filled(w_HBA, rows=LANES, columns=LANES).mT.contiguous()
    y_THB = x_THA.new_empty(T, H, B)
    for start in range(0, T, ROWS):
        count = min(ROWS, T - start)
        block_HRA = filled(x_THA[start : start + count].transpose(0, 1), rows=ROWS, columns=LANES)
        y_THB[start : start + count] = torch.bmm(block_HRA, w_HAB)[:, :count, :B].transpose(0, 1)
    return y_THB


def borrowed(
    exact: Callable[..., Results], gradient: Callable[..., Results], *tensors: Tensor | None
) -> Results:
    """exact(*tensors), with the gradients of `gradient(*tensors)`: the same function, rounded otherwise.

    Both return the same number of tensors. Gradients are computed from the inputs alone, which are kept.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        results: Results = _Borrowed.apply(exact, gradient, *tensors)
        return results
    with torch.no_grad():
        return exact(*tensors)


class _Borrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Any, gradient: Any, *tensors: Tensor | None) -> Results:
        ctx.gradient = gradient
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        results: Results = exact(*tensors)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [
                x if x is None else x.detach().requires_grad_(want)
                for x, want in zip(ctx.saved_tensors, wanted, strict=True)
            ]
            results = ctx.gradient(*inputs)
        results = (results,) if isinstance(results, Tensor) else results
        pairs = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None and y.requires_grad]
        leaves = [x for x in inputs if x is not None and x.requires_grad]
        outputs, given = zip(*pairs, strict=True) if pairs else ((), ())
        found = iter(torch.autograd.grad(outputs, leaves, given, allow_unused=True) if pairs else ())
        return None, None, *(next(found, None) if want else None for want in wanted)
