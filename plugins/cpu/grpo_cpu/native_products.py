"""Matrix products of the C++ pack, for operands in bfloat16 and in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .native import load

_ops = load()


class Products(NamedTuple):
    """What one dtype has; a weight is [N, K] everywhere."""

    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """x [T, K] W^T + b"""
    linear_out: Callable[[Tensor, Tensor, Tensor], None]
    """The same without b, into a third tensor."""
    input_grad: Callable[[Tensor, Tensor], Tensor]
    """g [T, N] W"""
    weight_grad: Callable[[Tensor, Tensor], Tensor]
    """g^T x in their dtype"""
    add_weight_grad: Callable[[Tensor, Tensor, Tensor], None]
    """g^T x, added to a float32 tensor"""
    packed_numel: Callable[[int, int], int]
    pack_linear: Callable[[Tensor, Tensor], None]
    """W in panels, into a tensor of `packed_numel` elements"""
    linear_packed: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    """`linear` on such a tensor; N"""


def _wide_weight_grad(g_TN: Tensor, x_TK: Tensor) -> Tensor:
    total_NK = torch.zeros(g_TN.shape[1], x_TK.shape[1])
    _ops.wide_add_weight_grad(g_TN, x_TK, total_NK)
    return total_NK


_HALF = Products(
    linear=_ops.linear.default,
    linear_out=_ops.linear_out.default,
    input_grad=_ops.linear_input_grad.default,
    weight_grad=_ops.weight_grad.default,
    add_weight_grad=_ops.add_weight_grad.default,
    packed_numel=_ops.packed_numel.default,
    pack_linear=_ops.pack_linear.default,
    linear_packed=_ops.linear_packed.default,
)
_WIDE = Products(
    linear=_ops.wide_linear.default,
    linear_out=_ops.wide_linear_out.default,
    input_grad=_ops.wide_input_grad.default,
    weight_grad=_wide_weight_grad,
    add_weight_grad=_ops.wide_add_weight_grad.default,
    packed_numel=_ops.wide_packed_numel.default,
    pack_linear=_ops.wide_pack_linear.default,
    linear_packed=_ops.wide_linear_packed.default,
)


def products_of(x: Tensor) -> Products:
    """The products for a tensor's dtype; they raise RuntimeError for operands of others."""
    return _WIDE if x.dtype == torch.float32 else _HALF
