"""How packed sequences are cut into dense tiles for batched matrix products.

A tile is n sequences of similar length that share a parent (or have none), padded to the same length; or
a block of queries of one long sequence. Pads repeat the sequence's own last token, so that whatever is in
another sequence, NaN included, never reaches it. Padded keys come after every real query of their
sequence, so the causal mask hides them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

SCORES = 1 << 20
"""Most scores of a tile: 2 MiB in bfloat16, about what a core's second-level cache and half of it hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """n sequences, Q queries each, against P keys of their parent and S keys of their own."""

    n: int
    Q: int
    S: int
    parent: slice
    """Tokens of the parent that are seen; empty without one."""
    query_rows: Tensor
    """int64 [n * Q] tokens."""
    key_rows: Tensor
    """int64 [n * S] tokens."""
    pads: Tensor | None
    """int64 indices of padded queries within n * Q."""
    mask_MS: Tensor
    """Added to the scores: 0 or -inf, [Q * rep, P + S]."""
    block: slice | None
    """The tokens of the keys, where the tile is a block of one sequence; such gradients add up."""

    @property
    def P(self) -> int:
        """Keys of the parent."""
        return self.parent.stop - self.parent.start


@dataclass(frozen=True, slots=True, kw_only=True)
class TilePlan:
    """The tiles of a batch, and where each token is among their rows laid end to end."""

    tiles: tuple[Tile, ...]
    query_at: Tensor
    """int64 [T] row of each token among all tiles' queries."""
    key_at: Tensor
    """int64 [T] row among the keys of tiles that are no blocks; the row after the last for the others."""


@lru_cache(maxsize=8)
def plan_tiles(
    ends: tuple[int, ...],
    parents: tuple[int, ...],
    heads: int,
    rep: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
) -> TilePlan:
    """Cut segments into tiles. `ends` are cumulative lengths, `parents` indices or -1, `rep` is H // K."""
    tiles: list[Tile] = []

    @cache
    def mask(queries: range, keys: range, parent: range) -> Tensor:
        return _mask(queries, keys, parent, rep, causal, window, dtype)

    for parent, lengths in _families(ends, parents).items():
        P = 0 if parent < 0 else ends[parent + 1] - ends[parent]
        start = 0 if parent < 0 else ends[parent]
        for bucket in _buckets(lengths, P, heads, causal):
            L = max(length for _, length in bucket)
            if len(bucket) == 1 and heads * L * (P + L) > SCORES:
                tiles.extend(_blocks(ends[bucket[0][0]], L, start, P, heads, causal, window, mask))
            else:
                seen = range(0 if window is None else min(P, max(0, P + 1 - window)), P)
                rows, pads = _padded_rows(ends, bucket, L)
                tiles.append(Tile(
                    n=len(bucket), Q=L, S=L, parent=slice(start + seen.start, start + P), query_rows=rows,
                    key_rows=rows, pads=pads, block=None,
                    mask_MS=mask(range(P, P + L), range(P, P + L), seen),
                ))  # fmt: skip
    return _with_places(tiles, ends[-1])


def _families(ends: Sequence[int], parents: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """(segment, length) of the segments that are not empty, by parent, the longest first."""
    families: dict[int, list[tuple[int, int]]] = {}
    for segment, parent in enumerate(parents):
        length = ends[segment + 1] - ends[segment]
        if length:
            families.setdefault(parent, []).append((segment, length))
    return {parent: sorted(rows, key=lambda row: -row[1]) for parent, rows in families.items()}


def _buckets(lengths: list[tuple[int, int]], P: int, heads: int, causal: bool) -> list[list[tuple[int, int]]]:
    """Neighbours in length whose pads are few; without a causal mask pads would be seen, so none at all."""
    buckets: list[list[tuple[int, int]]] = []
    for row in lengths:
        last = buckets[-1] if buckets else []
        longest = last[0][1] if last else 0
        close = row[1] == longest or (causal and (longest <= row[1] + 8 or longest <= 1.25 * row[1]))
        if last and close and (len(last) + 1) * heads * longest * (P + longest) <= SCORES:
            last.append(row)
        else:
            buckets.append([row])
    return buckets


def _padded_rows(ends: Sequence[int], bucket: list[tuple[int, int]], L: int) -> tuple[Tensor, Tensor | None]:
    starts = torch.tensor([ends[segment] for segment, _ in bucket])
    counts = torch.tensor([length for _, length in bucket])
    at_nL = torch.arange(L).expand(len(bucket), L)
    rows = (starts[:, None] + torch.minimum(at_nL, counts[:, None] - 1)).reshape(-1)
    pads = (at_nL >= counts[:, None]).reshape(-1).nonzero()[:, 0]
    return rows, pads if pads.numel() else None


def _blocks(
    start: int, L: int, parent_start: int, P: int, heads: int, causal: bool, window: int | None,
    mask: Callable[[range, range, range], Tensor],
) -> list[Tile]:  # fmt: skip
    """Query blocks of one long sequence, each against the keys that it can see."""
    size = max(16, SCORES // (heads * (P + L)))
    tiles = []
    for first in range(0, L, size):
        queries = range(P + first, P + min(first + size, L))
        low = 0 if window is None else max(0, queries.start + 1 - window)
        seen = range(min(low, P), P)
        keys = range(max(low, P), queries.stop if causal else P + L)
        own = slice(start + keys.start - P, start + keys.stop - P)
        tiles.append(Tile(
            n=1, Q=len(queries), S=len(keys), parent=slice(parent_start + seen.start, parent_start + P),
            query_rows=torch.arange(start + queries.start - P, start + queries.stop - P),
            key_rows=torch.arange(own.start, own.stop), pads=None, block=own,
            mask_MS=mask(queries, keys, seen),
        ))  # fmt: skip
    return tiles


def _mask(
    queries: range, keys: range, parent: range, rep: int, causal: bool, window: int | None, dtype: torch.dtype
) -> Tensor:
    at_Q = torch.arange(queries.start, queries.stop)
    at_S = torch.cat([torch.arange(parent.start, parent.stop), torch.arange(keys.start, keys.stop)])
    back_QS = at_Q[:, None] - at_S[None, :]
    hidden_QS = back_QS < 0 if causal else torch.zeros_like(back_QS, dtype=torch.bool)
    if window is not None:
        hidden_QS = hidden_QS | (back_QS >= window)
    mask_QS = torch.zeros(hidden_QS.shape, dtype=dtype).masked_fill_(hidden_QS, -torch.inf)
    return mask_QS.repeat_interleave(rep, dim=0)


def _with_places(tiles: list[Tile], tokens: int) -> TilePlan:
    query_at, key_at = torch.zeros(tokens, dtype=torch.int64), torch.full((tokens,), -1)
    queries = keys = 0
    for tile in tiles:
        count = tile.n * tile.Q
        # Pads name a token that an earlier row of the tile holds already: write back to front.
        places = torch.arange(count)
        real = torch.ones(count, dtype=torch.bool)
        if tile.pads is not None:
            real[tile.pads] = False
        query_at[tile.query_rows[real]] = queries + places[real]
        queries += count
        if tile.block is None:
            key_at[tile.key_rows[real]] = keys + places[real]
            keys += count
    return TilePlan(tiles=tuple(tiles), query_at=query_at, key_at=torch.where(key_at < 0, keys, key_at))
