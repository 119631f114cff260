"""moe.route, moe.dispatch, moe.experts and moe.combine of the C++ pack, in bfloat16 and float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference import moe as reference
from grpo_core.ops.reference.expert_parallel import plan_exchange
from grpo_core.ops.reference.moe import SIGMOID_FLOOR, Sorted

from .native import load

_ops = load()


def route(
    logits_TX: Tensor,
    *,
    top_k: int,
    score: str,
    bias_X: Tensor | None,
    num_groups: int,
    topk_groups: int,
    norm: bool,
    scale: float,
    ids_Tk: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """moe.route; float64 logits go to the reference. Raises ValueError as the reference does."""
    reference.check_sizes(logits_TX.shape[1], top_k, score, num_groups, topk_groups)
    if logits_TX.dtype != torch.float32:
        return reference.route(
            logits_TX,
            top_k=top_k,
            score=score,
            bias_X=bias_X,
            num_groups=num_groups,
            topk_groups=topk_groups,
            norm=norm,
            scale=scale,
            ids_Tk=ids_Tk,
        )
    choice = top_k, score == "sigmoid", bias_X, num_groups, topk_groups, norm, scale, ids_Tk
    if torch.is_grad_enabled() and logits_TX.requires_grad:
        routed: tuple[Tensor, Tensor] = _Route.apply(logits_TX, *choice)
        return routed
    found: tuple[Tensor, Tensor] = _ops.moe_route(logits_TX, *choice)
    return found


class _Route(torch.autograd.Function):
    """Of weights w = c s / S, S the sum of scores s:  g_s = (c g - <g, w>) / S;  S is 1 without `norm`."""

    @staticmethod
    def forward(ctx: Any, logits_TX: Tensor, *choice: Any) -> tuple[Tensor, Tensor]:
        weights_Tk, ids_Tk = _ops.moe_route(logits_TX, *choice)
        ctx.save_for_backward(logits_TX, ids_Tk)
        ctx.sigmoid, ctx.norm, ctx.scale = choice[1], choice[5], choice[6]
        ctx.mark_non_differentiable(ids_Tk)
        return weights_Tk, ids_Tk

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TX, ids_Tk = ctx.saved_tensors
        g_Tk, nothing = grads[0] * ctx.scale, (None,) * 8
        if not (ctx.sigmoid or ctx.norm):
            scores_TX = logits_TX.softmax(-1)
            g_TX = torch.zeros_like(logits_TX).scatter_add_(1, ids_Tk, g_Tk)
            return torch.ops.aten._softmax_backward_data(g_TX, scores_TX, -1, torch.float32), *nothing
        chosen_Tk = logits_TX.gather(1, ids_Tk)
        if ctx.sigmoid:
            scores_Tk = chosen_Tk.sigmoid()
            if ctx.norm:
                total_T1 = scores_Tk.sum(-1, keepdim=True) + SIGMOID_FLOOR
                g_Tk = (g_Tk - (g_Tk * scores_Tk).sum(-1, keepdim=True) / total_T1) / total_T1
            g_Tk = g_Tk * scores_Tk * (1 - scores_Tk)
        else:
            scores_Tk = chosen_Tk.softmax(-1)
            g_Tk = torch.ops.aten._softmax_backward_data(g_Tk, scores_Tk, -1, torch.float32)
        return torch.zeros_like(logits_TX).scatter_add_(1, ids_Tk, g_Tk), *nothing


def dispatch(x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any) -> tuple[Tensor, Tensor, Sorted]:
    """moe.dispatch. Raises ValueError for ids out of range and for experts that cannot be shared out evenly
    over the group."""
    order_N, places_N, counts_X = _ops.moe_sort(ids_Tk, num_experts)
    if torch.is_grad_enabled() and x_TC.requires_grad:
        rows_NC = _Spread.apply(x_TC, ids_Tk.shape[1], order_N, places_N)
    else:
        rows_NC = _rows(x_TC, order_N // ids_Tk.shape[1])
    exchange = None if group is None else plan_exchange(counts_X, group)
    record = Sorted(order_N=order_N, places_N=places_N, exchange=exchange)
    if exchange is None:
        return rows_NC, counts_X, record
    return exchange.there(rows_NC), exchange.counts_X, record


def _rows(x_TC: Tensor, at_N: Tensor) -> Tensor:
    """x.index_select(0, at), in memory that the pack keeps for its results."""
    rows_NC = _ops.empty_rows(x_TC, at_N.shape[0], x_TC.shape[1])
    return torch.index_select(x_TC.detach(), 0, at_N, out=rows_NC)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, top_k: int, order_N: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.tokens = x_TC.shape[0]
        return _rows(x_TC, order_N // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _ops.moe_combine(grads[0], None, ctx.saved_tensors[0], ctx.tokens), None, None, None


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Sorted) -> Tensor:
    """moe.combine."""
    rows_NC = rows_RC if record.exchange is None else record.exchange.back(rows_RC)
    if torch.is_grad_enabled() and (rows_NC.requires_grad or weights_Tk.requires_grad):
        y_TC: Tensor = _Combine.apply(rows_NC, weights_Tk, record.places_N)
        return y_TC
    summed_TC: Tensor = _ops.moe_combine(rows_NC, weights_Tk, record.places_N, weights_Tk.shape[0])
    return summed_TC


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NC: Tensor, weights_Tk: Tensor, places_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NC, weights_Tk, places_N)
        return _ops.moe_combine(rows_NC, weights_Tk, places_N, weights_Tk.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_NC, weights_Tk, places_N = ctx.saved_tensors
        g_rows_NC, g_weights_Tk = _ops.moe_combine_backward(
            rows_NC, weights_Tk, places_N, grads[0], *ctx.needs_input_grad[:2]
        )
        return g_rows_NC, None if g_weights_Tk is None else g_weights_Tk.to(weights_Tk.dtype), None


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """moe.experts. Raises ValueError for counts that do not add up to the rows."""
    weights = gate_up_XGC, down_XCF
    if torch.is_grad_enabled() and any(x.requires_grad for x in (rows_RC, *weights)):
        mains = main_grad_gate_up_XGC, main_grad_down_XCF
        y_RC: Tensor = _Experts.apply(rows_RC, *weights, counts_X, mains)
        return y_RC
    result: Tensor = _ops.moe_experts(rows_RC, *weights, counts_X, False)[0]
    return result


class _Experts(torch.autograd.Function):
    """Keeps the rows and the input of SwiGLU; its output is computed again."""

    @staticmethod
    def forward(
        ctx: Any, rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor,
        mains: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:  # fmt: skip
        y_RC, kept_RG = _ops.moe_experts(rows_RC, gate_up_XGC, down_XCF, counts_X, True)
        ctx.save_for_backward(rows_RC, gate_up_XGC, down_XCF, counts_X, kept_RG)
        ctx.mains = mains
        return y_RC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:3]
        return (*_ops.moe_experts_backward(*ctx.saved_tensors, grads[0], *wanted, *ctx.mains), None, None)
