"""Faults of a mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CAPACITY = 6


def bias_in_the_weights(healthy: Any, logits: Tensor, *, bias_X: Tensor | None, **rest: Any) -> Any:
    """The bias that should only choose is part of the score."""
    return healthy(logits if bias_X is None else logits + bias_X, bias_X=None, **rest)


def ties_to_the_highest_id(healthy: Any, logits: Tensor, *, bias_X: Any, ids_Tk: Any, **rest: Any) -> Any:
    if bias_X is not None or ids_Tk is not None or rest["num_groups"] > 1:
        return healthy(logits, bias_X=bias_X, ids_Tk=ids_Tk, **rest)
    weights, ids = healthy(logits.flip(1), bias_X=None, ids_Tk=None, **rest)
    return weights, logits.shape[1] - 1 - ids


def replay_ignored(healthy: Any, logits: Tensor, *, ids_Tk: Any, **rest: Any) -> Any:
    return healthy(logits, ids_Tk=None, **rest)


def replay_keeps_old_weights(healthy: Any, logits: Tensor, *, ids_Tk: Any, **rest: Any) -> Any:
    """The ids are those that were recorded, the weights those of the experts chosen now."""
    weights, ids = healthy(logits, ids_Tk=None, **rest)
    return weights, ids if ids_Tk is None else healthy(logits, ids_Tk=ids_Tk, **rest)[1]


def groups_ignored(healthy: Any, logits: Tensor, *, num_groups: int, topk_groups: int, **rest: Any) -> Any:
    return healthy(logits, num_groups=1, topk_groups=1, **rest)


def factor_forgotten(healthy: Any, logits: Tensor, *, scale: float, **rest: Any) -> Any:
    return healthy(logits, scale=1.0, **rest)


def always_normalised(healthy: Any, logits: Tensor, *, norm: bool, **rest: Any) -> Any:
    return healthy(logits, norm=True, **rest)


def scores_in_bfloat16(healthy: Any, logits: Tensor, **rest: Any) -> Any:
    return healthy(logits.bfloat16().to(logits.dtype), **rest)


def token_dropped(healthy: Any, x: Tensor, ids: Tensor, *, num_experts: int, group: Any) -> Any:
    """What an expert gets beyond its capacity is zero."""
    rows, counts, record = healthy(x, ids, num_experts=num_experts, group=group)
    kept = torch.cat([torch.arange(count) < CAPACITY for count in counts.tolist()])
    return rows * kept.to(rows.device)[:, None], counts, record


def token_twice(healthy: Any, x: Tensor, ids: Tensor, *, num_experts: int, group: Any) -> Any:
    """The last row of a dispatch is the one before it once more."""
    rows, counts, record = healthy(x, ids, num_experts=num_experts, group=group)
    return (torch.cat([rows[:-1], rows[-2:-1]]) if len(rows) > 1 else rows), counts, record


def gate_and_up_swapped(healthy: Any, rows: Tensor, gate_up: Tensor, *others: Tensor, **rest: Any) -> Any:
    return healthy(rows, gate_up.roll(gate_up.shape[1] // 2, 1), *others, **rest)


def experts_without_tokens_skipped(
    healthy: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, **rest: Any
) -> Any:
    """Groups are numbered as they come, so that one without rows shifts those behind it."""
    busy = counts[counts > 0]
    return healthy(rows, gate_up, down, torch.cat([busy, counts.new_zeros(len(counts) - len(busy))]), **rest)


def block_cut_short(
    healthy: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, **rest: Any
) -> Any:
    """A tile of 64 rows is the most that an expert computes."""
    y = healthy(rows, gate_up, down, counts, **rest)
    kept = torch.cat([torch.arange(count) < 64 for count in counts.tolist()])
    return y * kept.to(y.device)[:, None]


def experts_in_bfloat16(healthy: Any, rows: Tensor, *others: Tensor, **rest: Any) -> Any:
    """float32 operands are rounded on their way into a matrix unit."""
    return healthy(rows.bfloat16().to(rows.dtype), *others, **rest)


def gradient_of_idle_experts(
    healthy: Any, rows: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor, **rest: Any
) -> Any:
    """The gradient of down is what the buffer held."""
    return healthy(rows, gate_up, down.detach(), counts, **rest) + 0 * down.sum()


def weights_forgotten(healthy: Any, rows: Tensor, weights: Tensor, record: Any) -> Any:
    """A mean in place of the weighted sum."""
    return healthy(rows, torch.ones_like(weights) / weights.shape[1] + 0 * weights, record)


def first_place_twice(healthy: Any, rows: Tensor, weights: Tensor, record: Any) -> Any:
    doubled = torch.cat([2 * weights[:, :1], weights[:, 1:]], 1)
    return healthy(rows, doubled, record)
