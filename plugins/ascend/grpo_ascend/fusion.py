"""Packed attention with `npu_fusion_attention` in its layout TND, for training and for whole prompts."""

from __future__ import annotations

import functools

import torch
import torch_npu
from torch import Tensor

from grpo_core.ops.common import Common

from .lengths import ends_of, key_plan

MAX_SEGMENTS = 1024
"""Most sequences of one call."""
MAX_HEADS = 256
"""Most query heads of one call."""
RIGHT_DOWN = 3
"""sparse_mode: causal, aligned at the end of queries and keys."""
BAND = 4
"""sparse_mode: keys from pre_tockens before to next_tockens after a query, aligned at the end."""


@functools.cache
@torch.inference_mode(False)
def causal_mask(device: torch.device) -> Tensor:
    """The mask that the sparse modes expand, whatever the lengths: bool [2048, 2048], True is masked.

    A rollout may be the first to ask; autograd could not save a tensor of inference mode for backward.
    """
    return torch.triu(torch.ones(2048, 2048, dtype=torch.bool, device=device), diagonal=1)


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    ends = ends_of(cu_seqlens, q_THD.shape[0], common)
    return attend(q_THD, k_TKD, v_TKE, ends, ends, scale=scale, causal=causal, window=window)


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`.

    A child's keys are its parent's and its own side by side; aligned at the end, its first query sees all of
    the parent. Keys and values of a parent are copied for each child, projections and queries are not.
    """
    plan = key_plan(cu_seqlens, parents, q_THD.shape[0], common)
    if plan.rows is not None:
        k_TKD, v_TKE = k_TKD.index_select(0, plan.rows), v_TKE.index_select(0, plan.rows)
    return attend(q_THD, k_TKD, v_TKE, plan.ends_q, plan.ends_k, scale=scale, causal=True, window=window)


def attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, ends_q: list[int], ends_k: list[int], *, scale: float,
    causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    """Attention of each query segment over its key segment; both given by their ends, with a leading 0."""
    heads, groups = k_TKD.shape[1], q_THD.shape[1] // k_TKD.shape[1]
    at_once = max(1, MAX_HEADS // groups)
    if heads > at_once:
        parts = [
            attend(
                q_THD[:, groups * first : groups * (first + at_once)].contiguous(),
                k_TKD[:, first : first + at_once].contiguous(),
                v_TKE[:, first : first + at_once].contiguous(),
                ends_q, ends_k, scale=scale, causal=causal, window=window,
            )
            for first in range(0, heads, at_once)
        ]  # fmt: skip
        return torch.cat(parts, 1)
    outputs = []
    for start in range(0, len(ends_q) - 1, MAX_SEGMENTS):
        stop = min(start + MAX_SEGMENTS, len(ends_q) - 1)
        queries, keys = _part(ends_q, start, stop), _part(ends_k, start, stop)
        if queries[0].start < queries[0].stop:
            q_tHD, k_sKD, v_sKE = q_THD[queries[0]], k_TKD[keys[0]], v_TKE[keys[0]]
            outputs.append(_call(q_tHD, k_sKD, v_sKE, queries[1], keys[1], scale, causal, window))
    if not outputs:
        return q_THD.new_zeros(0, q_THD.shape[1], v_TKE.shape[2])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _part(ends: list[int], start: int, stop: int) -> tuple[slice, list[int]]:
    """The tokens of some segments, and their ends without the leading 0, counted from the first of them."""
    first = ends[start]
    return slice(first, ends[stop]), [end - first for end in ends[start + 1 : stop + 1]]


def _call(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, ends_q: list[int], ends_k: list[int], scale: float,
    causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    masked = causal or window is not None
    o_THE: Tensor = torch_npu.npu_fusion_attention(
        q_THD,
        k_TKD,
        v_TKE,
        q_THD.shape[1],
        "TND",
        atten_mask=causal_mask(q_THD.device) if masked else None,
        scale=scale,
        keep_prob=1.0,
        pre_tockens=2147483647 if window is None else window - 1,
        next_tockens=0 if causal else 2147483647,
        actual_seq_qlen=ends_q,
        actual_seq_kvlen=ends_k,
        sparse_mode=(RIGHT_DOWN if window is None else BAND) if masked else 0,
    )[0]
    return o_THE
