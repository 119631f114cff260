"""linear.dense and linear.packed of the C++ pack, bfloat16 or float32.

A weight's gradient is added up in float32, in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference.fused import check_same

from .native import load
from .native_ops import tracked
from .native_products import products_of
from .remake import Kept, Maker, maker_of

_ops = load()


def dense(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, main_grad_NK: Tensor | None) -> Tensor:
    """See `grpo_core.ops.fused.DenseLinear`. An input that its maker can make again is not kept."""
    y_TN: Tensor
    if tracked(x_TK, weight_NK, bias_N):
        y_TN = _Dense.apply(x_TK, weight_NK, bias_N, main_grad_NK, maker_of(x_TK))
    else:
        y_TN = products_of(x_TK).linear(x_TK, weight_NK, bias_N)
    return y_TN


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None,
        main_grad_NK: Tensor | None, maker: Maker | Kept | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight_NK, None if isinstance(maker, Maker) else x_TK)
        ctx.main_grad_NK, ctx.maker = main_grad_NK, maker
        return products_of(x_TK).linear(x_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_NK, x_TK = ctx.saved_tensors
        g_TN, main_grad_NK, g_weight_NK = grads[0], ctx.main_grad_NK, None
        ops = products_of(g_TN)
        if ctx.needs_input_grad[1]:
            x_TK = ctx.maker.again() if x_TK is None else x_TK
            if main_grad_NK is None:
                g_weight_NK = ops.weight_grad(g_TN, x_TK)
            else:
                ops.add_weight_grad(g_TN, x_TK, main_grad_NK)
        g_x_TK = ops.input_grad(g_TN, weight_NK) if ctx.needs_input_grad[0] else None
        g_bias_N = _ops.bias_grad(g_TN) if ctx.needs_input_grad[2] else None
        return g_x_TK, g_weight_NK, g_bias_N, None, None


class PackedLinear:
    """linear.packed: see `grpo_core.ops.fused.PackedLinear`. Keeps the weight in panels of the pack's own.

    Panels of bfloat16 hold pairs of inputs: a weight with an odd number of them is kept as it is.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        # Facts for `update`: meta tensors hold no memory.
        self.like_NK = torch.empty_like(weight_NK, device="meta")
        self.rows, width = weight_NK.shape
        self.bias_N = None if bias_N is None else bias_N.detach().clone()
        self.ops = products_of(weight_NK)
        self.odd = width % 2 == 1 and weight_NK.dtype == torch.bfloat16
        size = self.like_NK.shape if self.odd else (self.ops.packed_numel(self.rows, width),)
        self.packed = weight_NK.new_empty(size)
        self.multiply = self.ops.linear_packed
        self._pack(weight_NK)

    def _pack(self, weight_NK: Tensor) -> None:
        with torch.no_grad():
            self.packed.copy_(weight_NK) if self.odd else self.ops.pack_linear(weight_NK, self.packed)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Returns x W^T + b, [T, N]."""
        if self.odd:
            return torch.nn.functional.linear(x_TK, self.packed, self.bias_N)
        y_TN: Tensor = self.multiply(x_TK, self.packed, self.bias_N, self.rows)
        return y_TN

    def update(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        """Pack new values in the place of the old. Raises ValueError when shape or dtype differ."""
        check_same(self.like_NK, weight_NK)
        check_same(self.bias_N, bias_N)
        self._pack(weight_NK)
        if self.bias_N is not None and bias_N is not None:
            self.bias_N.copy_(bias_N)

    def nbytes(self) -> int:
        """Bytes of the packed weight and the bias."""
        return self.packed.nbytes + (0 if self.bias_N is None else self.bias_N.nbytes)
