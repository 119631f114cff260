"""Packed attention with Transformer Engine's DotProductAttention in THD: cuDNN's fused kernels.

Transformer Engine decides on repeatable kernels when a module is made, by torch's setting, so modules are
kept for either.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from grpo_core.ops.common import Common

from .lengths import ends_of, gather, key_plan


@functools.lru_cache(maxsize=64)
def module(heads: int, kv_heads: int, key: int, value: int, scale: float, deterministic: bool) -> Any:
    """The attention of these sizes, without parameters; `deterministic` is torch's setting of now."""
    return DotProductAttention(
        heads,
        key if key == value else (key, value),
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`; without a window."""
    ends = ends_of(cu_seqlens, q_THD.shape[0], common)
    mask = "padding_causal" if causal else "padding"
    return _attend(q_THD, k_TKD, v_TKE, ends, ends, max_seqlen, max_seqlen, scale, mask, window)


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`; without a window. Each child's keys are gathered behind its
    parent's."""
    plan = key_plan(cu_seqlens, parents, q_THD.shape[0], common)
    if plan is None:
        return varlen(
            q_THD, k_TKD, v_TKE, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=True,
            window=window, common=common,
        )  # fmt: skip
    return _attend(
        q_THD, gather(k_TKD, plan), gather(v_TKE, plan), ends_of(cu_seqlens, q_THD.shape[0], common),
        plan.cu_seqlens_k, max_seqlen, plan.max_seqlen_k, scale, "padding_causal_bottom_right", window,
    )  # fmt: skip


def _attend(
    q_THD: Tensor, k_NKD: Tensor, v_NKE: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int,
    scale: float, mask: str, window: int | None,
) -> Tensor:  # fmt: skip
    if window is not None:
        raise ValueError("windows of packed sequences are not offered through Transformer Engine")
    (T, H, D), (_, K, E) = q_THD.shape, v_NKE.shape
    if not T:
        return q_THD.new_empty(0, H, E)
    attention = module(H, K, D, E, scale, torch.are_deterministic_algorithms_enabled())
    o_TW: Tensor = attention(
        q_THD,
        k_NKD,
        v_NKE,
        qkv_format="thd",
        cu_seqlens_q=ends_q,
        cu_seqlens_kv=ends_k,
        max_seqlen_q=max_q,
        max_seqlen_kv=max_k,
        attn_mask_type=mask,
    )
    return o_TW.view(T, H, E)
