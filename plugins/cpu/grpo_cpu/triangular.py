"""Many small unit lower triangular systems at once, by their inverses, which the backward pass uses again.

Diagonal blocks are solved, then joined in pairs: the inverse of [[A, 0], [B, C]] is
[[A^-1, 0], [-C^-1 B A^-1, C^-1]]. Whole systems handed to LAPACK one by one take several times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BASE = 16
"""Size of the blocks that are solved; systems are BASE times a power of two."""


def minus_product(a: Tensor, b: Tensor) -> Tensor:
    """-a b for batches [n, K, ...], without a pass for the sign."""
    y = torch.baddbmm(a.new_empty(1, 1, 1), a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=-1)
    return y.view(*a.shape[:2], *y.shape[1:])


def inverse(system_bCC: Tensor) -> Tensor:
    """(I + tril(system, -1))^-1; what is on and above the diagonal is not read."""
    C = system_bCC.shape[-1]
    eye = torch.eye(BASE, dtype=system_bCC.dtype)
    base = _diagonal_blocks(system_bCC, BASE)
    done = torch.linalg.solve_triangular(base, eye.expand_as(base), upper=False, unitriangular=True)
    size = BASE
    while size < C:
        first, second = done.view(-1, 2, size, size).unbind(1)
        below = _diagonal_blocks(system_bCC, 2 * size)[:, size:, :size]
        done = first.new_zeros(first.shape[0], 2 * size, 2 * size)
        done[:, :size, :size], done[:, size:, size:] = first, second
        done[:, size:, :size] = torch.baddbmm(below, second, below @ first, beta=0, alpha=-1)
        size *= 2
    return done.view(system_bCC.shape)


def _diagonal_blocks(x_bCC: Tensor, size: int) -> Tensor:
    n = x_bCC.shape[-1] // size
    blocks = x_bCC.view(-1, n, size, n, size).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2).reshape(-1, size, size)


class Solve(torch.autograd.Function):
    """x of (I + tril(system, -1)) x = right, for [n, K, C, C] and [n, K, C, X]."""

    @staticmethod
    def forward(ctx: Any, system: Tensor, right: Tensor) -> Tensor:
        inverted = inverse(system)
        x = inverted @ right
        ctx.save_for_backward(inverted, x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        inverted, x = ctx.saved_tensors
        d_right = inverted.mT @ grads[0]
        return minus_product(d_right, x.mT).tril_(-1), d_right
