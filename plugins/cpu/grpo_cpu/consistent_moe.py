"""moe.route, moe.experts and moe.combine, each token alone."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.reference import rowwise
from grpo_core.ops.reference.attention import accumulate
from grpo_core.ops.reference.moe import SIGMOID_FLOOR, Sorted, check_sizes, replay, select

from . import moe as gradient
from .consistent import borrowed, product
from .consistent_fused import exact_swiglu


def route(
    logits_TX: Tensor, *, top_k: int, score: str, bias_X: Tensor | None, num_groups: int, topk_groups: int,
    norm: bool, scale: float, ids_Tk: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.moe.MoeRoute`. Raises ValueError as the reference does."""
    check_sizes(logits_TX.shape[1], top_k, score, num_groups, topk_groups)
    scores_TX = rowwise.sigmoid(logits_TX) if score == "sigmoid" else rowwise.softmax(logits_TX)
    with torch.no_grad():
        chosen_Tk = select(scores_TX, top_k, bias_X, num_groups, topk_groups)
        if ids_Tk is not None:
            chosen_Tk = replay(chosen_Tk, ids_Tk, logits_TX.shape[1])
    if score == "softmax" and norm:
        return rowwise.softmax(logits_TX.gather(1, chosen_Tk)) * scale, chosen_Tk
    weights_Tk = scores_TX.gather(1, chosen_Tk)
    if norm:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + SIGMOID_FLOOR)
    return weights_Tk * scale, chosen_Tk


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.moe.MoeExperts`."""
    counts = counts_X.tolist()

    def exact(rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor) -> Tensor:
        y_RC = torch.empty_like(rows_RC, memory_format=torch.contiguous_format)
        parts = zip(torch.split(rows_RC, counts), torch.split(y_RC, counts), strict=True)
        for expert, (x, y) in enumerate(parts):
            if len(x):
                y.copy_(product(exact_swiglu(product(x, gate_up_XGC[expert])), down_XCF[expert]))
        return y_RC

    def smooth(rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor) -> Tensor:
        return gradient.experts(
            rows_RC, gate_up_XGC, down_XCF, counts_X, main_grad_gate_up_XGC=main_grad_gate_up_XGC,
            main_grad_down_XCF=main_grad_down_XCF,
        )  # fmt: skip

    y_RC = borrowed(exact, smooth, rows_RC, gate_up_XGC, down_XCF)
    assert isinstance(y_RC, Tensor)
    return y_RC


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Sorted) -> Tensor:
    """See `grpo_core.ops.moe.MoeCombine`; a token's rows are added in the order of its ids."""
    rows_NC = rows_RC if record.exchange is None else record.exchange.back(rows_RC)

    def exact(rows_NC: Tensor, weights_Tk: Tensor) -> Tensor:
        (T, k), acc = weights_Tk.shape, accumulate(rows_NC.dtype)
        places_Tk, wide_Tk = record.places_N.view(T, k), weights_Tk.to(acc)
        y_TC = torch.zeros(T, rows_NC.shape[1], dtype=acc)
        for j in range(k):
            y_TC = y_TC + rows_NC.index_select(0, places_Tk[:, j]).to(acc) * wide_Tk[:, j, None]
        return y_TC.to(rows_NC.dtype)

    def smooth(rows_NC: Tensor, weights_Tk: Tensor) -> Tensor:
        alone = Sorted(order_N=record.order_N, places_N=record.places_N, exchange=None)
        return gradient.combine(rows_NC, weights_Tk, alone)

    y_TC = borrowed(exact, smooth, rows_NC, weights_Tk)
    assert isinstance(y_TC, Tensor)
    return y_TC
