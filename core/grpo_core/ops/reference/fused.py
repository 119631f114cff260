"""The smaller ops in plain torch: the specification of norm, rotary, SwiGLU, linears, sampling, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import Common
from .attention import accumulate
from .logprob import logprob as logprob


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Any:
    """Reference of `norm.rms`."""
    acc = accumulate(x.dtype)
    total = x if residual is None else x + residual
    wide = total.to(acc)
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    y = (normed * (1 + w.to(acc) if zero_centered else w)).to(x.dtype)
    return y if residual is None else (y, total)


def linear_dense(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, *, main_grad_NK: Tensor | None
) -> Tensor:
    """Reference of `linear.dense`."""
    if main_grad_NK is None:
        return torch.nn.functional.linear(x_TK, weight_NK, bias_N)
    apply: Any = _AccumulatingLinear.apply
    y_TN: Tensor = apply(x_TK, weight_NK, main_grad_NK)
    return y_TN if bias_N is None else y_TN + bias_N


class _AccumulatingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, main_grad_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.main_grad_NK = main_grad_NK
        return x_TK @ weight_NK.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.main_grad_NK.add_(grads[0].float().t() @ x_TK.float())
        return (grads[0] @ weight_NK if ctx.needs_input_grad[0] else None), None, None


def rope_apply(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Reference of `rope.apply`."""
    return (
        _rotate(q_THD, cos_TR, sin_TR, interleaved),
        _rotate(k_TKD, cos_TR, sin_TR, interleaved),
    )


def _rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    acc = accumulate(x_THD.dtype)
    pairs = cos_TR.shape[1]
    cos_T1R, sin_T1R = cos_TR.to(acc)[:, None], sin_TR.to(acc)[:, None]
    turned, rest = x_THD[..., : 2 * pairs].to(acc), x_THD[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    first, second = a * cos_T1R - b * sin_T1R, b * cos_T1R + a * sin_T1R
    joined = torch.stack([first, second], -1).flatten(-2) if interleaved else torch.cat([first, second], -1)
    return torch.cat([joined.to(x_THD.dtype), rest], -1)


def swiglu(gate_up: Tensor) -> Tensor:
    """Reference of `mlp.swiglu`; computed in float32 and rounded once."""
    gate, up = gate_up.to(accumulate(gate_up.dtype)).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


class PlainLinear:
    """Reference of `linear.packed`: keeps the tensors that it was given, and updates them in place."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        self.weight_NK = weight_NK
        self.bias_N = bias_N

    def __call__(self, x_TK: Tensor) -> Tensor:
        """See `PackedLinear.__call__`."""
        return torch.nn.functional.linear(x_TK, self.weight_NK, self.bias_N)

    def update(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        """Copy new values. Raises ValueError when shape, dtype or the presence of a bias differ."""
        check_same(self.weight_NK, weight_NK)
        check_same(self.bias_N, bias_N)
        with torch.no_grad():
            self.weight_NK.copy_(weight_NK)
            if self.bias_N is not None and bias_N is not None:
                self.bias_N.copy_(bias_N)

    def nbytes(self) -> int:
        """Nothing beyond the tensors given."""
        return 0


def check_same(have: Tensor | None, new: Tensor | None) -> None:
    """Raise ValueError unless both tensors are absent or equal in shape and dtype."""
    old_facts = None if have is None else (tuple(have.shape), have.dtype)
    new_facts = None if new is None else (tuple(new.shape), new.dtype)
    if old_facts != new_facts:
        raise ValueError(f"a linear layer of {old_facts} cannot take values of {new_facts}")


def sample_token(
    logits_BV: Tensor,
    u_B: Tensor,
    *,
    temperature_B: Tensor,
    top_k_B: Tensor | None,
    top_p_B: Tensor | None,
    min_p_B: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `sample.token`, in float64. Token ids are the order of the cumulative distribution.

    Ties at the border of top-k stay in; top-p keeps the likeliest tokens (lowest id first among equals)
    until their mass reaches p. A row without a finite largest logit raises FloatingPointError too.
    """
    wide_BV = logits_BV.double()
    top_B1 = wide_BV.amax(-1, keepdim=True)
    if not bool(top_B1.isfinite().all()) or bool(wide_BV.isnan().any()):
        raise FloatingPointError("a row of logits holds NaN, +inf or nothing but -inf")
    V = logits_BV.shape[1]
    ids_V = torch.arange(V, device=logits_BV.device)
    greedy_B = torch.where(wide_BV == top_B1, ids_V, V).amin(-1)
    cold_B = temperature_B == 0
    safe_B = torch.where(cold_B, torch.ones_like(temperature_B), temperature_B).double()
    tempered_BV = filter_logits((wide_BV - top_B1) / safe_B[:, None], top_k_B, top_p_B, min_p_B)
    probs_BV = tempered_BV.softmax(-1)
    cumulative_BV = probs_BV.cumsum(-1)
    target_B = u_B.double() * cumulative_BV[:, -1]
    drawn_B = (cumulative_BV <= target_B[:, None]).sum(-1)
    last_B = torch.where(probs_BV > 0, ids_V, -1).amax(-1)
    ids_B = torch.where(cold_B, greedy_B, torch.minimum(drawn_B, last_B))
    at_B1 = ids_B[:, None]
    logprob_B = tempered_BV.log_softmax(-1).gather(1, at_B1)[:, 0]
    logprob1_B = wide_BV.log_softmax(-1).gather(1, at_B1)[:, 0]
    return ids_B, torch.where(cold_B, 0.0, logprob_B).float(), logprob1_B.float()


def filter_logits(
    tempered_BV: Tensor, top_k_B: Tensor | None, top_p_B: Tensor | None, min_p_B: Tensor | None
) -> Tensor:
    """Tempered logits with -inf for the tokens that top-k, then top-p, then min-p take away."""
    V = tempered_BV.shape[1]
    if top_k_B is not None:
        kept_B = torch.where((top_k_B <= 0) | (top_k_B > V), V, top_k_B).long()
        border_B1 = tempered_BV.sort(-1, descending=True).values.gather(1, kept_B[:, None] - 1)
        tempered_BV = tempered_BV.masked_fill(tempered_BV < border_B1, -torch.inf)
    if top_p_B is not None:
        probs_BV, order_BV = tempered_BV.softmax(-1).sort(stable=True, dim=-1, descending=True)
        before_BV = probs_BV.cumsum(-1) - probs_BV
        out_BV = (before_BV >= top_p_B.double()[:, None]) & (top_p_B < 1)[:, None]
        out_BV[:, 0] = False
        out_BV = torch.zeros_like(out_BV).scatter(1, order_BV, out_BV)
        tempered_BV = tempered_BV.masked_fill(out_BV, -torch.inf)
    if min_p_B is not None:
        gap_B = min_p_B.double().log()
        floor_B1 = tempered_BV.amax(-1, keepdim=True) + gap_B[:, None]
        tempered_BV = tempered_BV.masked_fill(tempered_BV < floor_B1, -torch.inf)
    return tempered_BV


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
    """Reference of `optim.adamw` (Loshchilov and Hutter 2019, algorithm 2). Gradients stay as they are."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, weight_decays, copies, strict=True)
    with torch.no_grad():
        for param, grad, first, second, weight_decay, copy in rows:
            scaled = grad * grad_scale
            first.lerp_(scaled, 1 - beta1)
            second.mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            param.mul_(1 - lr * weight_decay)
            param.addcdiv_(first, second.div(correction2).sqrt_().add_(eps), value=-lr / correction1)
            if copy is not None:
                copy.copy_(param)
