"""Packed attention with torch's own varlen kernel, forward and backward, and over pages for the rollout.

The kernel is flash-attn's, built into torch: causal is aligned at the end of the keys, and its backward pass
repeats its bits where torch is asked for deterministic algorithms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common

from .bits import repeatable
from .cache import PagedLayer, Reading, paged
from .lengths import ends_of, gather, key_plan, longest, rows, shared


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    ends = ends_of(cu_seqlens, q_THD.shape[0], common)
    if not q_THD.shape[0]:
        return q_THD.new_empty(0, q_THD.shape[1], v_TKE.shape[2])
    out: Any = varlen_attn(
        q_THD,
        k_TKD,
        v_TKE,
        cu_seq_q=ends,
        cu_seq_k=ends,
        max_q=rows(max_seqlen),
        max_k=max_seqlen,
        scale=scale,
        window_size=sides(window, causal),
        enable_gqa=True,
    )
    return repeatable(out)


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
    out: Any = varlen_attn(
        q_THD,
        gather(k_TKD, plan),
        gather(v_TKE, plan),
        cu_seq_q=ends_of(cu_seqlens, q_THD.shape[0], common),
        cu_seq_k=plan.cu_seqlens_k,
        max_q=rows(max_seqlen),
        max_k=plan.max_seqlen_k,
        scale=scale,
        window_size=sides(window, True),
        enable_gqa=True,
    )
    return repeatable(out)


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`, over a `PagedLayer`."""
    layer = paged(cache)
    ends = ends_of(cu_seqlens_q, q_THD.shape[0], common)
    most = rows(longest(cu_seqlens_q, q_THD.shape[0], common))
    reading = layer.reading(slots, seqlens_k, common)
    return _over_pages(q_THD, layer, ends, most, reading, scale, window, common)


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`, over a `PagedLayer`."""
    layer = paged(cache)
    one_each = shared(common, "one each", lambda: counting(slots, 1))
    reading = layer.reading(slots, seqlens_k, common)
    return _over_pages(q_BHD, layer, one_each, 1, reading, scale, window, common)


def _over_pages(
    q_THD: Tensor, layer: PagedLayer, ends: Tensor, max_q: int, reading: Reading, scale: float,
    window: int | None, common: Common | None,
) -> Tensor:  # fmt: skip
    if not q_THD.shape[0]:
        return q_THD.new_empty(0, q_THD.shape[1], layer.v_PSKE.shape[3])
    out: Any = varlen_attn(
        q_THD,
        layer.k_PSKD,
        layer.v_PSKE,
        cu_seq_q=ends,
        # The kernel wants the room of each sequence here, and how much of it is used beside it.
        cu_seq_k=shared(common, "rooms", lambda: counting(reading.used_B, reading.room)),
        max_q=max_q,
        max_k=reading.room,
        scale=scale,
        window_size=sides(window, True),
        enable_gqa=True,
        seqused_k=reading.used_B,
        block_table=reading.blocks_BW,
    )
    attended: Tensor = out
    return attended


def counting(like: Tensor, step: int) -> Tensor:
    """int32 [B + 1]: 0, step, 2 * step, ... for B sequences."""
    end = (like.shape[0] + 1) * step
    return torch.arange(0, end, step, dtype=torch.int32, device=like.device)


def sides(window: int | None, causal: bool) -> tuple[int, int]:
    """How many keys before and after its own a query may see; -1 is all of them. (-1, 0) is causal."""
    return (-1 if window is None else window - 1), (0 if causal else -1)
