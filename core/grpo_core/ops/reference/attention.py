"""Attention in plain torch: the specification of every `attention.*` op, on any device and in float64.

Scores, softmax and the weighted sum are computed in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..attention import CacheSpec, LayerCache
from ..common import Common
from .slots import SlotCache
from .tokens import TokenTable


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op of `dtype` computes in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(q_QHD: Tensor, k_SKD: Tensor, v_SKE: Tensor, visible_QS: Tensor, scale: float) -> Tensor:
    """Softmax attention of Q queries over S keys of one sequence; o_QHE in the dtype of q.

    A query that sees no key gives zeros.
    """
    acc = accumulate(q_QHD.dtype)
    Q, H, D = q_QHD.shape
    K = k_SKD.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads cannot be shared out over {K} key/value heads")
    q_QKGD = q_QHD.to(acc).reshape(Q, K, H // K, D)
    scores_KGQS = torch.einsum("qkgd,skd->kgqs", q_QKGD, k_SKD.to(acc)) * scale
    scores_KGQS = scores_KGQS.masked_fill(~visible_QS, -torch.inf)
    top_KGQ1 = scores_KGQS.amax(-1, keepdim=True).clamp_min(torch.finfo(acc).min)
    weights_KGQS = torch.exp(scores_KGQS - top_KGQ1)
    total_KGQ1 = weights_KGQS.sum(-1, keepdim=True)
    weights_KGQS = weights_KGQS / torch.where(total_KGQ1 > 0, total_KGQ1, torch.ones_like(total_KGQ1))
    o_QKGE = torch.einsum("kgqs,ske->qkge", weights_KGQS, v_SKE.to(acc))
    return o_QKGE.reshape(Q, H, v_SKE.shape[2]).to(q_QHD.dtype)


def visible(positions_Q: Tensor, positions_S: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """Which keys each query sees, bool [Q, S]. The window limits the keys before a query, not those after."""
    back_QS = positions_Q[:, None] - positions_S[None, :]
    seen_QS = back_QS >= 0 if causal else torch.ones_like(back_QS, dtype=torch.bool)
    return seen_QS if window is None else seen_QS & (back_QS < window)


def bounds(cu_seqlens: Tensor, tokens: int, common: Common | None = None) -> list[int]:
    """The cumulative lengths as ints, from the host where `common` has them. Raises ValueError when they do
    not cover the tokens in order."""
    known = None if common is None else common.cu_seqlens
    ends = [int(end) for end in cu_seqlens.tolist()] if known is None else known
    falls = any(start > end for start, end in pairwise(ends))
    if not ends or ends[0] != 0 or ends[-1] != tokens or falls:
        raise ValueError(f"cu_seqlens {ends[:8]}... must rise from 0 to the {tokens} tokens given")
    return ends


def varlen(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    window: int | None,
    common: Common | None = None,
) -> Tensor:
    """Reference of `attention.varlen`: one sequence after the other."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)
    outputs = [q_THD.new_zeros(0, q_THD.shape[1], v_TKE.shape[2])]
    for start, end in pairwise(ends):
        if start == end:
            continue
        at = torch.arange(end - start, device=q_THD.device)
        seen_QS = visible(at, at, causal=causal, window=window)
        outputs.append(attend(q_THD[start:end], k_TKD[start:end], v_TKE[start:end], seen_QS, scale))
    return torch.cat(outputs)


def shared_prefix(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKE: Tensor,
    *,
    cu_seqlens: Tensor,
    parents: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    common: Common | None = None,
) -> Tensor:
    """Reference of `attention.shared_prefix`: each segment against [its parent | itself]."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)
    tree = parent_list(parents, len(ends) - 1, common)
    outputs = [q_THD.new_zeros(0, q_THD.shape[1], v_TKE.shape[2])]
    for segment, parent in enumerate(tree):
        start, end = ends[segment], ends[segment + 1]
        if start == end:
            continue
        parts = [slice(start, end)]
        if parent >= 0:
            parts.insert(0, slice(ends[parent], ends[parent + 1]))
        keys = torch.cat([k_TKD[part] for part in parts])
        values = torch.cat([v_TKE[part] for part in parts])
        at = torch.arange(keys.shape[0], device=q_THD.device)
        seen_QS = visible(at[keys.shape[0] - (end - start) :], at, causal=True, window=window)
        outputs.append(attend(q_THD[start:end], keys, values, seen_QS, scale))
    return torch.cat(outputs)


def parent_list(parents: Tensor, segments: int, common: Common | None = None) -> list[int]:
    """The parents as ints, from the host where `common` has them. Raises ValueError for one that is not an
    earlier segment without a parent."""
    known = None if common is None else common.parents
    tree = [int(parent) for parent in parents.tolist()] if known is None else known
    if len(tree) != segments:
        raise ValueError(f"{len(tree)} parents were given for {segments} segments")
    for segment, parent in enumerate(tree):
        if parent >= segment or parent < -1 or (parent >= 0 and tree[parent] >= 0):
            raise ValueError(
                f"parent {parent} of segment {segment} is not an earlier segment without a parent"
            )
    return tree


class DenseLayer:
    """One layer of `DenseCache`: rows of keys and values, found through the table of the cache."""

    __slots__ = ("k_RKD", "table", "v_RKE")

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools for the keys and the values."""
        self.k_RKD, self.v_RKE = pools

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.rows(slots_T, positions_T)
        self.k_RKD[rows_T] = k_TKD.to(self.k_RKD.dtype)
        self.v_RKE[rows_T] = v_TKE.to(self.v_RKE.dtype)


class DenseCache(SlotCache[TokenTable, DenseLayer]):
    """Reference of `attention.cache`: a pool of token rows and a table from (slot, position) to row.

    A fork's table starts with the rows of its parent, so a shared prefix is stored once.
    """

    def __init__(self, spec: CacheSpec) -> None:
        table = TokenTable(spec.max_slots, spec.max_tokens, spec.device)
        layers = [DenseLayer(table) for _ in range(spec.num_layers)]
        rows = (spec.max_tokens, spec.num_key_value_heads)
        super().__init__(spec, table, layers, ((*rows, spec.head_dim), (*rows, spec.v_head_dim)))


def prefill(
    q_THD: Tensor,
    cache: LayerCache,
    *,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None,
    common: Common | None = None,
) -> Tensor:
    """Reference of `attention.prefill` over a `DenseLayer`."""
    layer = _dense(cache)
    ends = bounds(cu_seqlens_q, q_THD.shape[0], common)
    outputs = [q_THD.new_zeros(0, q_THD.shape[1], layer.v_RKE.shape[2])]
    for index, (slot, length) in enumerate(zip(slots.tolist(), seqlens_k.tolist(), strict=True)):
        start, end = ends[index], ends[index + 1]
        if start == end:
            continue
        at = torch.arange(int(length), device=q_THD.device)
        rows_S = layer.table.rows(torch.full_like(at, int(slot)), at)
        seen_QS = visible(at[at.numel() - (end - start) :], at, causal=True, window=window)
        outputs.append(attend(q_THD[start:end], layer.k_RKD[rows_S], layer.v_RKE[rows_S], seen_QS, scale))
    return torch.cat(outputs)


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """Reference of `attention.decode`: a prefill of one token for each sequence."""
    one_each = torch.arange(q_BHD.shape[0] + 1, dtype=torch.int32, device=q_BHD.device)
    return prefill(
        q_BHD, cache, cu_seqlens_q=one_each, seqlens_k=seqlens_k, slots=slots, scale=scale, window=window
    )


def _dense(cache: LayerCache) -> DenseLayer:
    if not isinstance(cache, DenseLayer):
        raise TypeError(f"the reference attention reads layers of DenseCache, not {type(cache).__name__}")
    return cache
