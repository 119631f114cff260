"""How packed segments are cut into chunks for the gated delta rule.

Chunks lie in rounds: first the first chunk of every segment, then the second of those that have one, and so
on, the longest segments in front. A round is then one batch of products whose states are a prefix of the
batch before, and nothing but the end of a segment's last chunk is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
"""Most tokens of a chunk."""
LEAST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """The chunks of a batch."""

    size: int
    """Tokens of a chunk."""
    rounds: tuple[int, ...]
    """Segments of each round."""
    tokens: Tensor
    """int64 [n * size] token of each place; T for a pad."""
    places: Tensor
    """int64 [T] place of each token."""
    order: Tensor
    """int64 [S] the segments, those with the most chunks first."""
    ranks: Tensor
    """int64 [S] where each segment is in `order`."""
    starts: tuple[int, ...]
    """First chunk of each round, then the number of chunks."""


@lru_cache(maxsize=8)
# A plan made by the rollout is read in training, where inference tensors cannot be saved for backward.
@torch.inference_mode(False)
def plan_chunks(ends: tuple[int, ...], most: int = CHUNK) -> ChunkPlan:
    """Cut segments with these cumulative lengths. `most` bounds the tokens of a chunk."""
    lengths = [end - start for start, end in pairwise(ends)]
    longest = max(lengths, default=0)
    size = min(most, max(LEAST, 1 << max(longest - 1, 0).bit_length()))
    counts = [-(-length // size) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda segment: -counts[segment])
    rounds = tuple(sum(count > at for count in counts) for at in range(max(counts, default=0)))
    starts = (0, *accumulate(rounds))
    pieces = []
    for at, members in enumerate(rounds):
        first = torch.tensor([ends[segment] for segment in order[:members]]) + at * size
        last = torch.tensor([ends[segment + 1] for segment in order[:members]])
        token_SC = first[:, None] + torch.arange(size)
        pieces.append(torch.where(token_SC < last[:, None], token_SC, ends[-1]).reshape(-1))
    tokens = torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
    real = tokens < ends[-1]
    places = torch.empty(ends[-1], dtype=torch.int64)
    places[tokens[real]] = real.nonzero()[:, 0]
    order_S = torch.tensor(order, dtype=torch.int64)
    return ChunkPlan(
        size=size, rounds=rounds, tokens=tokens, places=places, order=order_S,
        ranks=torch.argsort(order_S), starts=starts,
    )  # fmt: skip


def _pad(x: Tensor, plan: ChunkPlan) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, plan.tokens)


class Pad(torch.autograd.Function):
    """Tokens [T, ...] at their places [n * size, ...], zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ChunkPlan) -> Tensor:
        ctx.plan = plan
        return _pad(x, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.plan.places), None


class Unpad(torch.autograd.Function):
    """The tokens [T, ...] of places [n * size, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: ChunkPlan) -> Tensor:
        ctx.plan = plan
        return x.index_select(0, plan.places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _pad(grads[0], ctx.plan), None
