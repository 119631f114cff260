"""Packed attention with torch's flex_attention: the packing is a mask over the whole batch, of which only
blocks with something to see are computed. A prompt's keys are read where they are, by all completions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds, parent_list

from .lengths import shared


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    # Without the compiler all scores would be kept.
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=True)
    return compiled


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    return _attend(q_THD, k_TKD, v_TKE, cu_seqlens, None, scale, causal, window, common)


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`."""
    return _attend(q_THD, k_TKD, v_TKE, cu_seqlens, parents, scale, True, window, common)


def _attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, cu_seqlens: Tensor, parents: Tensor | None, scale: float,
    causal: bool, window: int | None, common: Common | None,
) -> Tensor:  # fmt: skip
    T = q_THD.shape[0]

    def make() -> BlockMask | None:
        sees = packing(cu_seqlens, parents, T, causal=causal, window=window, common=common)
        if not T:
            return None
        # The compiled form makes no [T, T] of it.
        return create_block_mask(sees, None, None, T, T, str(q_THD.device), _compile=q_THD.is_cuda)

    mask = shared(common, ("flex", parents is None, causal, window), make)
    if mask is None:
        return q_THD.new_empty(0, q_THD.shape[1], v_TKE.shape[2])
    attend: Any = _compiled() if q_THD.is_cuda else flex_attention
    q_1HTD, k_1KTD, v_1KTE = (x.transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKE))
    o_1HTE: Any = attend(q_1HTD, k_1KTD, v_1KTE, block_mask=mask, scale=scale, enable_gqa=True)
    out: Tensor = o_1HTE[0].transpose(0, 1)
    return out


def packing(
    cu_seqlens: Tensor,
    parents: Tensor | None,
    tokens: int,
    *,
    causal: bool,
    window: int | None,
    common: Common | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Which key (last argument) each query sees, by their rows in the batch; batch and head mean nothing.

    Raises ValueError as `bounds` and `parent_list` do.
    """
    ends = bounds(cu_seqlens, tokens, common)
    count = len(ends) - 1
    tree = [-1] * count if parents is None else parent_list(parents, count, common)
    segment_T: list[int] = []
    place_T: list[int] = []
    for segment, (start, end) in enumerate(pairwise(ends)):
        before = ends[tree[segment] + 1] - ends[tree[segment]] if tree[segment] >= 0 else 0
        segment_T += [segment] * (end - start)
        place_T += range(before, before + end - start)
    of_T, at_T = (torch.tensor(one, dtype=torch.int64).to(cu_seqlens.device) for one in (segment_T, place_T))
    above_S = torch.tensor(tree, dtype=torch.int64).to(cu_seqlens.device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        family = (of_T[query] == of_T[key]) | (above_S[of_T[query]] == of_T[key])
        back = at_T[query] - at_T[key]
        seen = family & (back >= 0) if causal else family
        return seen if window is None else seen & (back < window)

    return sees
