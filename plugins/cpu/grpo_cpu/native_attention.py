"""attention.varlen and attention.shared_prefix of the C++ pack, bfloat16 or float32, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common

from .native import load

_ops = load()


def varlen(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    common: Common | None = None,
) -> Tensor:
    """attention.varlen."""
    return _attend(q_THD, k_TKD, v_TKE, cu_seqlens, None, scale, causal, window or 0)


def shared_prefix(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    *,
    cu_seqlens: Tensor,
    parents: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    common: Common | None = None,
) -> Tensor:
    """attention.shared_prefix."""
    return _attend(q_THD, k_TKD, v_TKE, cu_seqlens, parents, scale, True, window or 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Segments.apply(q, k, v, *rest)
    return _ops.segments(q, k, v, *rest, False)[0]


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends: Tensor,
        parents: Tensor | None,
        scale: float,
        causal: bool,
        window: int,
    ) -> Tensor:
        o, lse = _ops.segments(q, k, v, ends, parents, scale, causal, window, True)
        # Rotary made q and k anew; v alone would keep the whole projection of all three.
        ctx.save_for_backward(q, k, _ops.compact(v), o, lse, ends, parents)
        ctx.rest = (scale, causal, window)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, ends, parents = ctx.saved_tensors
        dq, dk, dv = _ops.segments_backward(q, k, v, o, lse, grads[0], ends, parents, *ctx.rest)
        return dq, dk, dv, None, None, None, None, None
