"""A mixture of experts in torch on the GPU: route, dispatch and combine ask the device for nothing.

Rows are sorted by expert with a stable sort, and come back by gathering: nothing is added in an order that
could differ. `experts` loops over the experts and reads their counts on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference.attention import accumulate
from grpo_core.ops.reference.expert_parallel import inverse, plan_exchange
from grpo_core.ops.reference.fused import swiglu
from grpo_core.ops.reference.moe import SIGMOID_FLOOR, Sorted, check_sizes, select

from .moe_products import Products, run_experts, swiglu_backward

Weigh = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""`weighted`, or a kernel for it."""
Slopes = Callable[..., tuple[Tensor | None, Tensor | None]]
"""`slopes`, or a kernel for it."""


def route(
    logits_TX: Tensor, *, top_k: int, score: str, bias_X: Tensor | None, num_groups: int, topk_groups: int,
    norm: bool, scale: float, ids_Tk: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.moe.MoeRoute`. Raises ValueError for sizes that make no sense; for fixed ids out
    of range as `require` does."""
    check_sizes(logits_TX.shape[1], top_k, score, num_groups, topk_groups)
    scores_TX = logits_TX.sigmoid() if score == "sigmoid" else logits_TX.softmax(-1)
    with torch.no_grad():
        chosen_Tk = select(scores_TX, top_k, bias_X, num_groups, topk_groups)
        if ids_Tk is not None:
            chosen_Tk = _replay(chosen_Tk, ids_Tk, logits_TX.shape[1])
    if score == "softmax" and norm:
        # Equal to softmax over all experts, then division by the sum, and safe where that sum underflows.
        return _take(logits_TX, chosen_Tk).softmax(-1) * scale, chosen_Tk
    weights_Tk = _take(scores_TX, chosen_Tk)
    if norm:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + SIGMOID_FLOOR)
    return weights_Tk * scale, chosen_Tk


def _replay(chosen_Tk: Tensor, ids_Tk: Tensor, experts: int) -> Tensor:
    """The fixed ids of each row that has them, the chosen ones of the rest."""
    if ids_Tk.shape != chosen_Tk.shape:
        raise ValueError(f"fixed ids {tuple(ids_Tk.shape)} for choices {tuple(chosen_Tk.shape)}")
    free_Tk = ids_Tk == -1
    sound_T = free_Tk.all(-1) | ((ids_Tk >= 0) & (ids_Tk < experts)).all(-1)
    require(sound_T.all(), f"a row of fixed ids holds neither -1 alone nor ids of {experts} experts alone")
    return torch.where(free_Tk, chosen_Tk, ids_Tk.to(torch.int64))


@torch.no_grad()
def require(true: Tensor, what: str) -> None:
    """Raise for a condition known to the device alone: at once on a CPU (ValueError), as a failed assertion
    in the stream on a GPU, so that the host need not wait."""
    if true.device.type == "cpu":
        if not bool(true):
            raise ValueError(what)
    else:
        torch._assert_async(true, what)


def _take(values_TX: Tensor, ids_Tk: Tensor) -> Tensor:
    """values[t, ids[t, j]]. The gradient is put in its places, not added up: a token's experts differ."""
    taken_Tk: Tensor = _Take.apply(values_TX, ids_Tk)
    return taken_Tk


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_TX: Tensor, ids_Tk: Tensor) -> Tensor:
        ctx.save_for_backward(ids_Tk)
        ctx.shape = values_TX.shape
        return values_TX.gather(1, ids_Tk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids_Tk,) = ctx.saved_tensors
        slope_TX = grads[0].new_zeros(ctx.shape)
        # One column at a time, so that even an id that a replay repeats keeps all of its gradient.
        for j in range(ids_Tk.shape[1]):
            id_T1 = ids_Tk[:, j : j + 1]
            slope_TX.scatter_(1, id_T1, slope_TX.gather(1, id_T1) + grads[0][:, j : j + 1])
        return slope_TX, None


def dispatch(x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any) -> tuple[Tensor, Tensor, Sorted]:
    """See `grpo_core.ops.moe.MoeDispatch`. Raises ValueError for experts that cannot be shared out evenly
    over the group; for ids out of range as `require` does."""
    return dispatch_with(weighted, x_TC, ids_Tk, num_experts, group)


def dispatch_with(
    weigh: Weigh, x_TC: Tensor, ids_Tk: Tensor, num_experts: int, group: Any
) -> tuple[Tensor, Tensor, Sorted]:
    """`dispatch`; `weigh` adds up the gradients of a token's rows."""
    order_N, counts_X = sort_by_expert(ids_Tk, num_experts)
    places_N = inverse(order_N)
    rows_NC: Tensor = _Spread.apply(x_TC, order_N // ids_Tk.shape[1], places_N, weigh)
    exchange = None if group is None else plan_exchange(counts_X, group)
    record = Sorted(order_N=order_N, places_N=places_N, exchange=exchange)
    if exchange is None:
        return rows_NC, counts_X, record
    return exchange.there(rows_NC), exchange.counts_X, record


def sort_by_expert(ids_Tk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """int64 numbers of the pairs in the order of their rows, and rows of each expert."""
    # Keys of 16 bits take two passes of a radix sort, keys of 64 bits eight.
    narrow = torch.int16 if num_experts < 1 << 15 else torch.int64
    outside = (ids_Tk < 0) | (ids_Tk >= num_experts)
    require(~outside.any(), f"an expert id outside of {num_experts} experts")
    sorted_N, order_N = ids_Tk.reshape(-1).to(narrow).sort(stable=True)
    # Not bincount, which asks the device how many there are.
    marks_X = torch.arange(num_experts + 1, device=ids_Tk.device, dtype=narrow)
    return order_N, torch.searchsorted(sorted_N, marks_X).diff()


class _Spread(torch.autograd.Function):
    """Each token's row, once for each of its experts; the gradient of a token is the sum of its rows'."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, token_N: Tensor, places_N: Tensor, weigh: Weigh) -> Tensor:
        ctx.save_for_backward(places_N)
        ctx.shape, ctx.weigh = x_TC.shape, weigh
        return x_TC.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (places_N,) = ctx.saved_tensors
        T, C = ctx.shape
        if T == 0:
            return grads[0].new_zeros(T, C), None, None, None
        return ctx.weigh(grads[0], None, places_N.view(T, -1)), None, None, None


def weighted(rows_NC: Tensor, weights_Tk: Tensor | None, places_Tk: Tensor) -> Tensor:
    """y[t] = sum_j weights[t, j] rows[places[t, j]] in float32 or wider, rounded once; None is 1."""
    total_TC = rows_NC.new_zeros(places_Tk.shape[0], rows_NC.shape[1], dtype=accumulate(rows_NC.dtype))
    for j in range(places_Tk.shape[1]):
        part_TC = rows_NC.index_select(0, places_Tk[:, j])
        if weights_Tk is None:
            total_TC += part_TC
        else:
            total_TC.addcmul_(part_TC.to(total_TC.dtype), weights_Tk[:, j, None].to(total_TC.dtype))
    return total_TC.to(rows_NC.dtype)


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Sorted) -> Tensor:
    """See `grpo_core.ops.moe.MoeCombine`."""
    return combine_with(weighted, slopes, rows_RC, weights_Tk, record)


def combine_with(weigh: Weigh, slopes: Slopes, rows_RC: Tensor, weights_Tk: Tensor, record: Sorted) -> Tensor:
    """`combine` with these sums and their gradients. Raises TypeError for the record of another dispatch."""
    if not isinstance(record, Sorted):
        raise TypeError(f"the record of a dispatch that sorts is wanted, not {type(record).__name__}")
    rows_NC = rows_RC if record.exchange is None else record.exchange.back(rows_RC)
    y_TC: Tensor = _Gather.apply(rows_NC, weights_Tk, record, weigh, slopes)
    return y_TC


def slopes(
    g_TC: Tensor, rows_NC: Tensor, weights_Tk: Tensor, order_N: Tensor, *, of_rows: bool, of_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and, in the order of the rows, of the weights; float32 or wider inside."""
    wide = accumulate(rows_NC.dtype)
    g_NC = g_TC.index_select(0, order_N // weights_Tk.shape[1]).to(wide)
    g_weights_N = (g_NC * rows_NC).sum(-1) if of_weights else None
    if not of_rows:
        return None, g_weights_N
    weights_N = weights_Tk.flatten().index_select(0, order_N).to(wide)
    return g_NC.mul_(weights_N[:, None]).to(rows_NC.dtype), g_weights_N


class _Gather(torch.autograd.Function):
    """g_row[t, j] = w[t, j] g_y[t] and g_w[t, j] = <g_y[t], row[t, j]>."""

    @staticmethod
    def forward(
        ctx: Any, rows_NC: Tensor, weights_Tk: Tensor, record: Sorted, weigh: Weigh, slopes: Slopes
    ) -> Tensor:
        ctx.save_for_backward(rows_NC, weights_Tk)
        ctx.record, ctx.slopes = record, slopes
        return weigh(rows_NC, weights_Tk, record.places_N.view(weights_Tk.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_NC, weights_Tk = ctx.saved_tensors
        record = ctx.record
        need_rows, need_weights, *_ = ctx.needs_input_grad
        g_rows_NC, g_weights_N = ctx.slopes(
            grads[0], rows_NC, weights_Tk, record.order_N, of_rows=need_rows, of_weights=need_weights
        )
        g_weights_Tk = None
        if g_weights_N is not None:
            g_weights_Tk = g_weights_N.index_select(0, record.places_N).view_as(weights_Tk)
            g_weights_Tk = g_weights_Tk.to(weights_Tk.dtype)
        return g_rows_NC, g_weights_Tk, None, None, None


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.moe.MoeExperts`: one product after the other. Raises ValueError for counts that do
    not add up to the rows."""
    counts = counts_X.tolist()
    if len(counts) != gate_up_XGC.shape[0] or sum(counts) != rows_RC.shape[0] or min(counts) < 0:
        raise ValueError(f"{rows_RC.shape[0]} rows of {gate_up_XGC.shape[0]} experts, counts {counts[:8]}...")
    return run_experts(
        LOOP, rows_RC, gate_up_XGC, down_XCF, counts, main_grad_gate_up_XGC, main_grad_down_XCF
    )


def _by_rows(x_RK: Tensor, weight_XKN: Tensor, counts: list[int]) -> Tensor:
    y_RN = x_RK.new_empty(x_RK.shape[0], weight_XKN.shape[2])
    for weight_KN, x, y in zip(weight_XKN.unbind(0), x_RK.split(counts), y_RN.split(counts), strict=True):
        torch.mm(x, weight_KN, out=y)
    return y_RN


def _of_weights(g_RN: Tensor, x_RK: Tensor, counts: list[int]) -> Tensor:
    g_XNK = g_RN.new_empty(len(counts), g_RN.shape[1], x_RK.shape[1])
    for g, x, out in zip(g_RN.split(counts), x_RK.split(counts), g_XNK.unbind(0), strict=True):
        torch.mm(g.t(), x, out=out)
    return g_XNK


def add_to_main(main_XNK: Tensor, g_RN: Tensor, x_RK: Tensor, counts: list[int]) -> None:
    """main += g^T x of each expert, in main's dtype throughout."""
    for main, g, x in zip(main_XNK.unbind(0), g_RN.split(counts), x_RK.split(counts), strict=True):
        if x.shape[0]:
            main.addmm_(g.t().to(main.dtype), x.to(main.dtype))


LOOP: Products[list[int]] = Products(
    by_rows=_by_rows, of_weights=_of_weights, add_to_main=add_to_main, swiglu=swiglu,
    swiglu_backward=swiglu_backward,
)  # fmt: skip
