"""The embedding lookup, with its gradient summed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lookup(weight_VC: Tensor, tokens_T: Tensor, main_grad_VC: Tensor | None = None) -> Tensor:
    """Rows of the table, [T, C]. Differentiable in the table.

    In bfloat16, torch adds up the gradients of a token's occurrences in bfloat16 on some devices: a sum of
    ones stops at 256. Here they are added in float32 and rounded once; or not at all where `main_grad_VC`
    (float32) is given, to which they are added then.
    """
    apply: Any = _Lookup.apply
    rows_TC: Tensor = apply(weight_VC, tokens_T, main_grad_VC)
    return rows_TC


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VC: Tensor, tokens_T: Tensor, main_grad_VC: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.like = weight_VC.shape, weight_VC.dtype
        ctx.main_grad_VC = main_grad_VC
        return weight_VC.index_select(0, tokens_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (tokens_T,) = ctx.saved_tensors
        shape, dtype = ctx.like
        acc = torch.promote_types(dtype, torch.float32)
        if ctx.main_grad_VC is not None:
            ctx.main_grad_VC.index_add_(0, tokens_T, grads[0].to(ctx.main_grad_VC.dtype))
            return None, None, None
        seen_U, place_T = torch.unique(tokens_T, return_inverse=True)
        sum_UC = grads[0].new_zeros(seen_U.shape[0], shape[1], dtype=acc)
        sum_UC.index_add_(0, place_T, grads[0].to(acc))
        return grads[0].new_zeros(shape).index_copy_(0, seen_U, sum_UC.to(dtype)), None, None
