"""norm.rms, rope.apply, mlp.swiglu, sample.token and optim.adamw of the C++ pack, bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common

from .native import load
from .remake import forget, kept

_ops = load()


def tracked(*tensors: Tensor | None) -> bool:
    """Whether autograd follows any of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Any:
    """norm.rms."""
    if tracked(x, w, residual):
        return _RmsNorm.apply(x, w, residual, eps, zero_centered)
    y, total, _ = _ops.rms_norm(x, w, residual, eps, zero_centered, False)
    return y if residual is None else (y, total)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, residual: Tensor | None, eps: float, zero_centered: bool
    ) -> Any:
        y, total, inverse = _ops.rms_norm(x, w, residual, eps, zero_centered, True)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.zero_centered, ctx.has_residual = eps, zero_centered, residual is not None
        ctx.make_again = _RmsNorm.again
        if residual is None:
            ctx.save_for_backward(x.contiguous(), w, inverse)
            return y
        ctx.save_for_backward(total, w, inverse)
        return y, total

    @staticmethod
    def again(ctx: Any) -> Tensor:
        total, w, _ = kept(ctx)
        y: Tensor = _ops.rms_norm(total.detach(), w.detach(), None, ctx.eps, ctx.zero_centered, False)[0]
        return y

    @staticmethod
    def backward(
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        total, w, inverse = kept(ctx)
        forget(ctx)
        dy, dtotal = grads[0], grads[1] if ctx.has_residual else None
        if dy is None:
            return dtotal, None, dtotal, None, None
        dx, dw = _ops.rms_norm_backward(total, w, inverse, dy, dtotal, ctx.zero_centered)
        return dx, dw, dx if ctx.has_residual else None, None, None


def rope_apply(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rope.apply."""
    if tracked(q_THD, k_TKD):
        return _Rope.apply(q_THD, cos_TR, sin_TR, interleaved), _Rope.apply(
            k_TKD, cos_TR, sin_TR, interleaved
        )
    return (
        _ops.rope(q_THD, cos_TR, sin_TR, interleaved, False),
        _ops.rope(k_TKD, cos_TR, sin_TR, interleaved, False),
    )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return _ops.rope(x_THD, cos_TR, sin_TR, interleaved, False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _ops.rope(grads[0], cos_TR, sin_TR, ctx.interleaved, True), None, None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """mlp.swiglu."""
    return _SwiGLU.apply(gate_up) if tracked(gate_up) else _ops.swiglu(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.make_again = _SwiGLU.again
        return _ops.swiglu(gate_up)

    @staticmethod
    def again(ctx: Any) -> Tensor:
        y: Tensor = _ops.swiglu(kept(ctx)[0].detach())
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = kept(ctx)
        forget(ctx)
        return _ops.swiglu_backward(gate_up, grads[0])


def sample_token(
    logits_BV: Tensor,
    u_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor | None,
    top_p_B: Tensor | None,
    min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sample.token over bfloat16 or float32 logits."""
    ids_B, logprob_B, logprob1_B, sound = _ops.sample(
        logits_BV, u_B, temperature_B, top_k_B, top_p_B, min_p_B
    )
    if not sound:
        raise FloatingPointError("a row of logits holds NaN, +inf or nothing but -inf")
    return ids_B, logprob_B, logprob1_B


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decays: Sequence[float],
    grad_scale: float,
    copies: Sequence[Tensor | None],
) -> None:
    """optim.adamw in one pass over memory; other copies than contiguous bfloat16 ones are made after it."""
    fused = [x if x is not None and x.dtype == torch.bfloat16 and x.is_contiguous() else None for x in copies]
    with torch.no_grad():
        _ops.adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            weight_decays,
            fused,
            step,
            lr,
            beta1,
            beta2,
            eps,
            grad_scale,
        )
        for param, copy, done in zip(params, copies, fused, strict=True):
            if copy is not None and done is None:
                copy.copy_(param)
