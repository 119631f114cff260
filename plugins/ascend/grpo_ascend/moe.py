"""A mixture of experts: the vendor's gating top-k, permute, grouped product and unpermute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import Tensor

from grpo_core.ops.reference.expert_parallel import Exchange, plan_exchange
from grpo_core.ops.reference.moe import SIGMOID_FLOOR, check_sizes, replay

from .grouped import grouped_linear
from .mlp import swiglu

TOP_TWO = 1
"""group_select_mode: a group is worth the sum of its two largest scores."""
NORM_TYPES = {"softmax": 0, "sigmoid": 1}


def route(
    logits_TX: Tensor, *, top_k: int, score: str, bias_X: Tensor | None, num_groups: int, topk_groups: int,
    norm: bool, scale: float, ids_Tk: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.moe.MoeRoute`. The vendor's op chooses; the weights come from torch, because its
    own are not differentiable in every version and would not follow a replay."""
    check_sizes(logits_TX.shape[1], top_k, score, num_groups, topk_groups)
    with torch.no_grad():
        chosen_Tk = _select(logits_TX, top_k, score, bias_X, num_groups, topk_groups)
        if ids_Tk is not None:
            chosen_Tk = replay(chosen_Tk, ids_Tk, logits_TX.shape[1])
    if score == "softmax" and norm:
        return logits_TX.gather(1, chosen_Tk).softmax(-1) * scale, chosen_Tk
    scores_TX = logits_TX.sigmoid() if score == "sigmoid" else logits_TX.softmax(-1)
    weights_Tk = scores_TX.gather(1, chosen_Tk)
    if norm:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + SIGMOID_FLOOR)
    return weights_Tk * scale, chosen_Tk


def _select(
    logits_TX: Tensor, top_k: int, score: str, bias_X: Tensor | None, num_groups: int, topk_groups: int
) -> Tensor:
    """Ids of the experts of each token, int64 [T, k]."""
    if not logits_TX.shape[0]:
        return logits_TX.new_zeros(0, top_k, dtype=torch.int64)
    # With all groups in the choice there is nothing to choose between them.
    groups = num_groups if topk_groups < num_groups else 1
    _, ids_Tk, _ = torch_npu.npu_moe_gating_top_k(
        logits_TX.detach(),
        top_k,
        bias=None if bias_X is None else bias_X.to(logits_TX.dtype),
        k_group=topk_groups if groups > 1 else 1,
        group_count=groups,
        group_select_mode=TOP_TWO,
        renorm=0,
        norm_type=NORM_TYPES[score],
        out_flag=False,
    )
    chosen: Tensor = ids_Tk.to(torch.int64)
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class Permuted:
    """What `combine` needs to undo a dispatch."""

    places_N: Tensor
    """int32 row of each (token, expert) pair."""
    exchange: Exchange | None


def dispatch(
    x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any
) -> tuple[Tensor, Tensor, Permuted]:
    """See `grpo_core.ops.moe.MoeDispatch`. Raises ValueError for ids out of range and for experts that cannot
    be shared out evenly over the group."""
    counts_X = ids_Tk.reshape(-1).bincount(minlength=num_experts)
    if counts_X.shape[0] != num_experts:
        raise ValueError(f"an expert id of {counts_X.shape[0] - 1} with {num_experts} experts")
    if x_TC.shape[0]:
        rows_NC, places_N = torch_npu.npu_moe_token_permute(x_TC, ids_Tk.to(torch.int32))
    else:
        rows_NC, places_N = x_TC, ids_Tk.reshape(-1).to(torch.int32)
    exchange = None if group is None else plan_exchange(counts_X, group)
    record = Permuted(places_N=places_N, exchange=exchange)
    if exchange is None:
        return rows_NC, counts_X, record
    return exchange.there(rows_NC), exchange.counts_X, record


def experts(rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor) -> Tensor:
    """See `grpo_core.ops.moe.MoeExperts`. Weights stay in the layout of the contract: the vendor's [X, in,
    out] is a view of it."""
    return grouped_linear(swiglu(grouped_linear(rows_RC, gate_up_XGC, counts_X)), down_XCF, counts_X)


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Permuted) -> Tensor:
    """See `grpo_core.ops.moe.MoeCombine`."""
    rows_NC = rows_RC if record.exchange is None else record.exchange.back(rows_RC)
    if not weights_Tk.shape[0]:
        # Nothing to add up; the weights stay in the graph.
        return rows_NC + weights_Tk.sum().to(rows_NC.dtype)
    y_TC: Tensor = torch_npu.npu_moe_token_unpermute(rows_NC, record.places_N, probs=weights_Tk)
    return y_TC
