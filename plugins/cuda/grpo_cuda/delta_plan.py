"""How packed segments are cut into chunks for the gated delta rule, and rows moved to places and back.

Chunks lie in rounds: the first chunk of every segment, then the second of those that have one, and so on, the
longest segments in front. A round is one batch of products whose states are the first of the batch before.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """The chunks of a batch."""

    size: int
    """Tokens of a chunk."""
    rounds: tuple[int, ...]
    """Segments of each round."""
    starts: tuple[int, ...]
    """First chunk of each round, then the number of chunks."""
    tokens: Tensor
    """int64 [n * size]: token of each place, T for none."""
    places: Tensor
    """int64 [T]: place of each token."""
    order: Tensor
    """int64 [S]: the segments, those with the most chunks first."""
    ranks: Tensor
    """int64 [S]: where each segment is in `order`."""


def plan_chunks(ends: list[int], device: torch.device, size: int = CHUNK) -> ChunkPlan:
    """Cut segments with these cumulative lengths."""
    counts = [-(-(end - start) // size) for start, end in pairwise(ends)]
    order = sorted(range(len(counts)), key=lambda segment: -counts[segment])
    rounds = tuple(sum(count > at for count in counts) for at in range(max(counts, default=0)))
    pieces = [torch.empty(0, dtype=torch.int64)]
    for at, members in enumerate(rounds):
        first_S = torch.tensor([ends[segment] for segment in order[:members]]) + at * size
        last_S = torch.tensor([ends[segment + 1] for segment in order[:members]])
        token_SC = first_S[:, None] + torch.arange(size)
        pieces.append(torch.where(token_SC < last_S[:, None], token_SC, ends[-1]).reshape(-1))
    tokens, order_S = torch.cat(pieces), torch.tensor(order, dtype=torch.int64)
    real = tokens < ends[-1]
    places = torch.empty(ends[-1], dtype=torch.int64)
    places[tokens[real]] = real.nonzero()[:, 0]
    return ChunkPlan(
        size=size, rounds=rounds, starts=(0, *accumulate(rounds)), tokens=tokens.to(device),
        places=places.to(device), order=order_S.to(device), ranks=order_S.argsort().to(device),
    )  # fmt: skip


def place(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
    """x[rows], zeros where a row is behind the last. `back` has, for each row of x, where it went (behind the
    last for nowhere); a row may go to one place only."""
    out: Tensor = _Place.apply(x, rows, back)
    return out


class _Place(torch.autograd.Function):
    """Gathers in both directions: adding up a gradient would be slow in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _padded(x).index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _padded(grads[0]).index_select(0, back), None, None


def _padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
