"""A mixture of experts in plain torch: the specification of every `moe.*` op, also in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import accumulate
from .expert_parallel import Exchange, inverse, plan_exchange
from .fused import linear_dense, swiglu

SIGMOID_FLOOR = 1e-20
"""Added to the sum that sigmoid weights are divided by, as DeepSeek-V3's own code does."""


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
    """Reference of `moe.route`.

    Raises ValueError for an unknown score, for groups that hold fewer than `top_k` experts or are of uneven
    size, and for fixed ids that are not of the shape [T, top_k] or out of range.
    """
    check_sizes(logits_TX.shape[1], top_k, score, num_groups, topk_groups)
    scores_TX = logits_TX.sigmoid() if score == "sigmoid" else logits_TX.softmax(-1)
    with torch.no_grad():
        chosen_Tk = select(scores_TX, top_k, bias_X, num_groups, topk_groups)
        if ids_Tk is not None:
            chosen_Tk = replay(chosen_Tk, ids_Tk, logits_TX.shape[1])
    if score == "softmax" and norm:
        # Equal to softmax over all experts, then division by the sum, and safe where that sum underflows.
        return logits_TX.gather(1, chosen_Tk).softmax(-1) * scale, chosen_Tk
    weights_Tk = scores_TX.gather(1, chosen_Tk)
    if norm:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + SIGMOID_FLOOR)
    return weights_Tk * scale, chosen_Tk


def check_sizes(experts: int, top_k: int, score: str, num_groups: int, topk_groups: int) -> None:
    """Raise ValueError for a routing that makes no sense."""
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"score must be 'sigmoid' or 'softmax', not {score!r}")
    if num_groups < 1 or experts % num_groups or not 1 <= topk_groups <= num_groups:
        raise ValueError(f"{experts} experts in {num_groups} groups, of which {topk_groups}, make no sense")
    if not 1 <= top_k <= topk_groups * (experts // num_groups):
        raise ValueError(f"{top_k} experts cannot be chosen from {topk_groups} groups of {num_groups}")


def select(scores_TX: Tensor, top_k: int, bias_X: Tensor | None, num_groups: int, topk_groups: int) -> Tensor:
    """Ids of the `top_k` experts of each token, int64 [T, k] (DeepSeek-V3, arXiv 2412.19437, 2.1.2)."""
    if bias_X is not None:
        scores_TX = scores_TX + bias_X
    if topk_groups < num_groups:
        T, X = scores_TX.shape
        grouped_TGX = scores_TX.view(T, num_groups, X // num_groups)
        worth_TG = grouped_TGX.sort(-1, descending=True).values[..., :2].sum(-1)
        out_TG = torch.ones_like(worth_TG, dtype=torch.bool)
        out_TG.scatter_(1, best(worth_TG, topk_groups), False)
        scores_TX = grouped_TGX.masked_fill(out_TG[..., None], -torch.inf).view(T, X)
    return best(scores_TX, top_k)


def best(values_TN: Tensor, count: int) -> Tensor:
    """Places of the largest values, largest first; the lower place first among equals, unlike topk."""
    return values_TN.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def replay(chosen_Tk: Tensor, ids_Tk: Tensor, experts: int) -> Tensor:
    """The fixed ids of each row that has them, the chosen ones of the rest."""
    if ids_Tk.shape != chosen_Tk.shape:
        raise ValueError(f"fixed ids {tuple(ids_Tk.shape)} for choices {tuple(chosen_Tk.shape)}")
    free_Tk = ids_Tk == -1
    sound_T = free_Tk.all(-1) | ((ids_Tk >= 0) & (ids_Tk < experts)).all(-1)
    if not bool(sound_T.all()):
        raise ValueError(f"a row of fixed ids holds neither -1 alone nor ids of {experts} experts alone")
    return torch.where(free_Tk, chosen_Tk, ids_Tk.to(torch.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """What `combine` needs to undo a dispatch."""

    order_N: Tensor
    """Number (token * k + place) of the pair that each row belongs to, sorted by expert."""
    places_N: Tensor
    """Row of each pair; the inverse of `order_N`."""
    exchange: Exchange | None


def dispatch(x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any) -> tuple[Tensor, Tensor, Sorted]:
    """Reference of `moe.dispatch`. Raises ValueError for ids out of range and for experts that cannot be
    shared out evenly over the group."""
    ids_N = ids_Tk.reshape(-1)
    counts_X = ids_N.bincount(minlength=num_experts)
    if counts_X.shape[0] != num_experts:
        raise ValueError(f"an expert id of {counts_X.shape[0] - 1} with {num_experts} experts")
    order_N = ids_N.argsort(stable=True)
    rows_NC = x_TC.index_select(0, order_N // ids_Tk.shape[1])
    exchange = None if group is None else plan_exchange(counts_X, group)
    record = Sorted(order_N=order_N, places_N=inverse(order_N), exchange=exchange)
    if exchange is None:
        return rows_NC, counts_X, record
    return exchange.there(rows_NC), exchange.counts_X, record


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Reference of `moe.experts`."""
    parts = torch.split(rows_RC, counts_X.tolist())
    # unbind, because indexing expert by expert gives each one a gradient of the size of all.
    weights = zip(gate_up_XGC.unbind(0), down_XCF.unbind(0), strict=True)
    mains = zip(_each(main_grad_gate_up_XGC, parts), _each(main_grad_down_XCF, parts), strict=True)
    rows = []
    for part, (gate_up, down), (main_gate_up, main_down) in zip(parts, weights, mains, strict=True):
        hidden = swiglu(linear_dense(part, gate_up, None, main_grad_NK=main_gate_up))
        rows.append(linear_dense(hidden, down, None, main_grad_NK=main_down))
    return torch.cat(rows)


def _each(main_grad: Tensor | None, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return [None] * len(parts) if main_grad is None else main_grad.unbind(0)


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Sorted) -> Tensor:
    """Reference of `moe.combine`."""
    rows_NC = rows_RC if record.exchange is None else record.exchange.back(rows_RC)
    acc = accumulate(rows_NC.dtype)
    pairs_TkC = rows_NC.index_select(0, record.places_N).view(*weights_Tk.shape, rows_NC.shape[1])
    return (pairs_TkC.to(acc) * weights_Tk.to(acc)[..., None]).sum(1).to(rows_NC.dtype)
