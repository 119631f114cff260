"""RMS norm in pieces that stay in cache; keeps its input and one float32 a row for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rows import pieces


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Any:
    """See `grpo_core.ops.fused.RmsNorm`."""
    total = x if residual is None else x + residual
    y = _RmsNorm.apply(total, w, eps, zero_centered)
    return y if residual is None else (y, total)


class _RmsNorm(torch.autograd.Function):
    """With n = x r and r = 1 / sqrt(mean(x^2) + eps):  g_x = r (g w - n mean(g w n)),  g_w = sum(g n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, zero_centered: bool) -> Tensor:
        C = x.shape[-1]
        acc = torch.promote_types(x.dtype, torch.float32)
        x_TC = x.reshape(-1, C)
        y_TC, r_T1 = torch.empty_like(x_TC), x_TC.new_empty(x_TC.shape[0], 1, dtype=acc)
        scale_C = 1 + w.to(acc) if zero_centered else w
        for part in pieces(x_TC.shape[0], C):
            wide = x_TC[part].to(acc)
            torch.mean(wide.square(), -1, keepdim=True, out=r_T1[part])
            r_T1[part].add_(eps).rsqrt_()
            y_TC[part] = (wide * r_T1[part]).to(x.dtype) * scale_C
        ctx.save_for_backward(x_TC, w, r_T1)
        ctx.zero_centered = zero_centered
        return y_TC.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x_TC, w, r_T1 = ctx.saved_tensors
        g_TC = grads[0].reshape(x_TC.shape)
        scale_C = w.to(r_T1.dtype) + (1 if ctx.zero_centered else 0)
        g_x_TC, g_w_C = torch.empty_like(x_TC), torch.zeros_like(scale_C)
        for part in pieces(x_TC.shape[0], x_TC.shape[1]):
            r_t1 = r_T1[part]
            n_tC = x_TC[part] * r_t1
            g_tC = g_TC[part].to(r_T1.dtype)
            g_n_tC = g_tC * n_tC
            g_w_C += g_n_tC.sum(0)
            mean_t1 = (g_n_tC @ scale_C)[:, None] / x_TC.shape[1]
            g_x_TC[part] = (g_tC * scale_C).addcmul_(n_tC, mean_t1, value=-1).mul_(r_t1)
        return g_x_TC.view(grads[0].shape), g_w_C.to(w.dtype), None, None
