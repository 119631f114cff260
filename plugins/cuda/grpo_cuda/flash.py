"""Packed attention with flash-attn, forward and backward, and attention over pages for the rollout.

Causal is aligned at the end of the keys, as the contracts want it. The backward pass repeats its bits where
torch is asked for deterministic algorithms.
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common

from .cache import paged
from .lengths import cumulative, ends_of, gather, key_plan, longest, rows, shared


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    ends = ends_of(cu_seqlens, q_THD.shape[0], common)
    if not q_THD.shape[0]:
        return q_THD.new_empty(0, q_THD.shape[1], v_TKE.shape[2])
    out: Tensor = flash_attn_varlen_func(
        q_THD,
        k_TKD,
        v_TKE,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=rows(max_seqlen),
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=sides(window, causal),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`: each child's keys are gathered behind its parent's."""
    plan = key_plan(cu_seqlens, parents, q_THD.shape[0], common)
    if plan is None:
        return varlen(
            q_THD, k_TKD, v_TKE, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=True,
            window=window, common=common,
        )  # fmt: skip
    out: Tensor = flash_attn_varlen_func(
        q_THD,
        gather(k_TKD, plan),
        gather(v_TKE, plan),
        cu_seqlens_q=ends_of(cu_seqlens, q_THD.shape[0], common),
        cu_seqlens_k=plan.cu_seqlens_k,
        max_seqlen_q=rows(max_seqlen),
        max_seqlen_k=plan.max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=sides(window, True),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`, over a `PagedLayer`."""
    layer = paged(cache)
    ends = ends_of(cu_seqlens_q, q_THD.shape[0], common)
    if not q_THD.shape[0]:
        return q_THD.new_empty(0, q_THD.shape[1], layer.v_PSKE.shape[3])
    reading = layer.reading(slots, seqlens_k, common)
    out: Tensor = flash_attn_varlen_func(
        q_THD,
        layer.k_PSKD,
        layer.v_PSKE,
        cu_seqlens_q=ends,
        cu_seqlens_k=shared(common, "cumulative", lambda: cumulative(seqlens_k)),
        max_seqlen_q=rows(longest(cu_seqlens_q, q_THD.shape[0], common)),
        max_seqlen_k=reading.room,
        softmax_scale=scale,
        causal=True,
        window_size=sides(window, True),
        block_table=reading.blocks_BW,
    )
    return out


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`, over a `PagedLayer`."""
    layer = paged(cache)
    if not q_BHD.shape[0]:
        return q_BHD.new_empty(0, q_BHD.shape[1], layer.v_PSKE.shape[3])
    reading = layer.reading(slots, seqlens_k, common)
    o_B1HE: Tensor = flash_attn_with_kvcache(
        q_BHD.unsqueeze(1),
        layer.k_PSKD,
        layer.v_PSKE,
        cache_seqlens=reading.used_B,
        block_table=reading.blocks_BW,
        softmax_scale=scale,
        causal=True,
        window_size=sides(window, True),
    )
    return o_B1HE.squeeze(1)


def sides(window: int | None, causal: bool) -> tuple[int, int]:
    """How many keys before and after its own a query may see; -1 is all of them."""
    return (-1 if window is None else window - 1), (0 if causal and window is not None else -1)
