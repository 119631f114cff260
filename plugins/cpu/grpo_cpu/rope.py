"""Rotary embedding in pieces that stay in cache; the backward pass turns the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common

from .rows import pieces


def rope_apply(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.RopeApply`."""
    return (
        _Rotate.apply(q_THD, cos_TR, sin_TR, interleaved),
        _Rotate.apply(k_TKD, cos_TR, sin_TR, interleaved),
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return rotate(x_THD, cos_TR, sin_TR, interleaved=interleaved, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return rotate(grads[0], cos_TR, sin_TR, interleaved=ctx.interleaved, back=True), None, None, None


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool, back: bool) -> Tensor:
    """A new tensor with the first 2R dimensions turned, or turned back."""
    T, H, D = x_THD.shape
    R = cos_TR.shape[1]
    acc = torch.promote_types(x_THD.dtype, torch.float32)
    y_THD = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
    sign = -1 if back else 1
    first, second = (
        (slice(0, 2 * R, 2), slice(1, 2 * R, 2)) if interleaved else (slice(0, R), slice(R, 2 * R))
    )
    for part in pieces(T, H * D):
        cos_t1R, sin_t1R = cos_TR[part, None].to(acc), sin_TR[part, None].to(acc)
        wide = x_THD[part].to(acc)
        a, b = wide[..., first], wide[..., second]
        y_THD[part, :, first] = (a * cos_t1R).addcmul_(b, sin_t1R, value=-sign)
        y_THD[part, :, second] = (b * cos_t1R).addcmul_(a, sin_t1R, value=sign)
    if 2 * R < D:
        y_THD[..., 2 * R :] = x_THD[..., 2 * R :]
    return y_THD
