"""attention.* over fixed blocks: packed, shared, cached or chunked, a query's result has the same bits.

A query sees the keys of its sequence, its parent's first, in blocks of KEYS that start at position 0. Queries
go through QUERIES at a time with all heads of a key head, so that every product has the same shape. Scores,
softmax and sums are float32. The largest score of a row is the same in any order; blocks are added up one
after the other, and a key that is not seen adds an exact zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import DenseLayer, bounds, parent_list
from grpo_core.ops.reference.tokens import TokenTable

from . import attention as gradient
from .consistent import LANES, borrowed, filled

KEYS = 64
"""Keys of a block."""
QUERIES = 8
"""Queries of a product."""
ELEMENTS = 1 << 23
"""Numbers gathered at once, 32 MiB of float32."""


class Sequences(NamedTuple):
    """Which rows of q and of the keys belong to each of S sequences."""

    starts_S: Tensor
    """int64; row of its first query, ..."""
    counts_S: Tensor
    """... its queries, which are its last tokens, ..."""
    lengths_S: Tensor
    """... and all of its tokens."""
    keys_SL: Tensor
    """int64; rows of its keys in order, then zeros up to a multiple of KEYS."""


def packed(ends: list[int], parents: list[int]) -> Sequences:
    """Segments whose keys lie where their queries do, behind those of their parents."""
    spans = [torch.arange(start, end) for start, end in pairwise(ends)]
    keys = [
        rows if parent < 0 or not len(rows) else torch.cat([spans[parent], rows])
        for rows, parent in zip(spans, parents, strict=True)
    ]
    width = _whole(max((len(rows) for rows in keys), default=0))
    table = [pad(rows, (0, width - len(rows))) for rows in keys]
    bounds_S = torch.tensor(ends, dtype=torch.int64)
    return Sequences(
        starts_S=bounds_S[:-1],
        counts_S=bounds_S.diff(),
        lengths_S=torch.tensor([len(rows) for rows in keys], dtype=torch.int64),
        keys_SL=torch.stack(table) if table else torch.zeros(0, 0, dtype=torch.int64),
    )


def cached(table: TokenTable, ends: list[int], slots: Tensor, seqlens_k: Tensor) -> Sequences:
    """The last tokens of sequences in a cache of core."""
    longest = int(seqlens_k.max()) if seqlens_k.numel() else 0
    keys_SL = table.table_SL[slots, :longest].clamp_min(0)
    bounds_S = torch.tensor(ends, dtype=torch.int64)
    return Sequences(
        starts_S=bounds_S[:-1],
        counts_S=bounds_S.diff(),
        lengths_S=seqlens_k.to(torch.int64),
        keys_SL=pad(keys_SL, (0, _whole(longest) - longest)),
    )


def _whole(length: int) -> int:
    return length + -length % KEYS


class Units(NamedTuple):
    """Queries by QUERIES of one sequence; n of them."""

    rows_nQ: Tensor
    """Rows of q; 0 where there is none."""
    positions_nQ: Tensor
    """-1 where there is none."""
    sequence_n: Tensor
    blocks_n: Tensor
    """Blocks of keys that it may see."""


def units_of(seqs: Sequences, *, causal: bool) -> Units:
    """All queries, those with few keys first."""
    per_S = (seqs.counts_S + QUERIES - 1) // QUERIES
    sequence_n = torch.arange(per_S.numel()).repeat_interleave(per_S)
    unit_n = torch.arange(sequence_n.numel()) - (per_S.cumsum(0) - per_S)[sequence_n]
    offset_nQ = unit_n[:, None] * QUERIES + torch.arange(QUERIES)
    there_nQ = offset_nQ < seqs.counts_S[sequence_n, None]
    before_n = (seqs.lengths_S - seqs.counts_S)[sequence_n]
    positions_nQ = torch.where(there_nQ, before_n[:, None] + offset_nQ, -1)
    seen_n = positions_nQ.amax(1) + 1 if causal else seqs.lengths_S[sequence_n]
    blocks_n = (seen_n + KEYS - 1) // KEYS
    order = blocks_n.argsort(stable=True)
    rows_nQ = torch.where(there_nQ, seqs.starts_S[sequence_n, None] + offset_nQ, 0)
    return Units(rows_nQ[order], positions_nQ[order], sequence_n[order], blocks_n[order])


def attend(
    q_THD: Tensor, k_XKD: Tensor, v_XKE: Tensor, seqs: Sequences, scale: float, *, causal: bool = True,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """o_THE in float32."""
    H, K, E = q_THD.shape[1], k_XKD.shape[1], v_XKE.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads cannot be shared out over {K} key/value heads")
    o_THE = torch.zeros(q_THD.shape[0], H, E)
    units = units_of(seqs, causal=causal)
    wide = max(K * (k_XKD.shape[2] + E), H * QUERIES) * KEYS
    start = 0
    while start < units.blocks_n.numel():
        # Units are sorted, so the last of a piece has the most blocks.
        room = ELEMENTS // wide
        fits_n = units.blocks_n[start:] * torch.arange(1, units.blocks_n.numel() - start + 1) <= room
        stop = start + max(1, int(fits_n.sum()))
        part = Units(*(x[start:stop] for x in units))
        _attend_units(o_THE, q_THD, k_XKD, v_XKE, seqs, part, scale, causal, window)
        start = stop
    return o_THE


def _attend_units(
    o_THE: Tensor, q_THD: Tensor, k_XKD: Tensor, v_XKE: Tensor, seqs: Sequences, units: Units, scale: float,
    causal: bool, window: int | None,
) -> None:  # fmt: skip
    (n, Q), (H, D), (K, E) = units.rows_nQ.shape, q_THD.shape[1:], v_XKE.shape[1:]
    blocks = int(units.blocks_n[-1])
    keys_nL = seqs.keys_SL[units.sequence_n, : blocks * KEYS]
    q_nQKGD = q_THD[units.rows_nQ].float().view(n, Q, K, H // K, D)
    q_bRD = filled(q_nQKGD.transpose(1, 2).reshape(n * K, Q * (H // K), D), columns=LANES)
    ones = v_XKE.new_ones(1, 1, 1)
    scores, values = [], []
    for j in range(blocks):
        rows_nS = keys_nL[:, j * KEYS : (j + 1) * KEYS]
        k_bSD = filled(_of_heads(k_XKD[rows_nS]), columns=LANES)
        v_bSE = _of_heads(v_XKE[rows_nS])
        values.append(filled(torch.cat([v_bSE, ones.float().expand(*v_bSE.shape[:2], 1)], -1), columns=LANES))
        hidden_nQS = ~_visible(units, seqs, j, causal, window)
        s_bRS = torch.bmm(q_bRD, k_bSD.mT.contiguous()) * scale
        hidden_nRS = hidden_nQS.repeat_interleave(H // K, 1)
        scores.append(s_bRS.view(n, K, -1, KEYS).masked_fill(hidden_nRS[:, None], -torch.inf).view_as(s_bRS))
    top_bR1 = torch.stack([s_bRS.amax(-1) for s_bRS in scores]).amax(0)[..., None]
    top_bR1 = top_bR1.clamp_min(torch.finfo(torch.float32).min)
    sum_bRE = torch.zeros(1)
    for s_bRS, v_bSE in zip(scores, values, strict=True):
        sum_bRE = sum_bRE + torch.bmm(torch.exp(s_bRS - top_bR1), v_bSE)
    total_bR1 = sum_bRE[..., E : E + 1]
    o_bRE = sum_bRE[..., :E] / torch.where(total_bR1 > 0, total_bR1, 1.0)
    o_nQHE = o_bRE.reshape(n, K, Q, H // K, E).transpose(1, 2).reshape(n, Q, H, E)
    there_nQ = units.positions_nQ >= 0
    o_THE[units.rows_nQ[there_nQ]] = o_nQHE[there_nQ]


def _of_heads(x_nSKD: Tensor) -> Tensor:
    """float32 [n * K, S, D], contiguous."""
    return x_nSKD.float().transpose(1, 2).reshape(-1, x_nSKD.shape[1], x_nSKD.shape[3])


def _visible(units: Units, seqs: Sequences, block: int, causal: bool, window: int | None) -> Tensor:
    """Which keys of a block each query sees, bool [n, Q, S]."""
    at_S = torch.arange(block * KEYS, (block + 1) * KEYS)
    back_nQS = units.positions_nQ[..., None] - at_S
    seen_nQS = (at_S < seqs.lengths_S[units.sequence_n, None])[:, None] & (units.positions_nQ >= 0)[..., None]
    if causal:
        seen_nQS = seen_nQS & (back_nQS >= 0)
    return seen_nQS if window is None else seen_nQS & (back_nQS < window)


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seqs = packed(ends, [-1] * (len(ends) - 1))
        return attend(q, k, v, seqs, scale, causal=causal, window=window).to(q.dtype)

    def smooth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gradient.varlen(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=causal, window=window
        )

    return _one(borrowed(exact, smooth, q_THD, k_TKD, v_TKE))


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)
    tree = parent_list(parents, len(ends) - 1, common)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, packed(ends, tree), scale, window=window).to(q.dtype)

    def smooth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gradient.shared_prefix(
            q, k, v, cu_seqlens=cu_seqlens, parents=parents, max_seqlen=max_seqlen, scale=scale, window=window
        )

    return _one(borrowed(exact, smooth, q_THD, k_TKD, v_TKE))


def _one(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(results, Tensor)
    return results


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float,
    window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`; over a layer of core's `DenseCache`."""
    if not isinstance(cache, DenseLayer):
        raise TypeError(f"consistent attention reads layers of DenseCache, not {type(cache).__name__}")
    seqs = cached(cache.table, bounds(cu_seqlens_q, q_THD.shape[0], common), slots, seqlens_k)
    return attend(q_THD, cache.k_RKD, cache.v_RKE, seqs, scale, window=window).to(q_THD.dtype)


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`."""
    one_each = torch.arange(q_BHD.shape[0] + 1, dtype=torch.int32)
    return prefill(
        q_BHD, cache, cu_seqlens_q=one_each, seqlens_k=seqlens_k, slots=slots, scale=scale, window=window
    )
