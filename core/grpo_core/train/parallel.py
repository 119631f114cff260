"""Data parallelism over the bound collectives: counts, metrics and gradients of all ranks.

Every rank calls the same functions in the same order, also one without a completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..ops.collectives import Group
    from ..types import Batch

BUCKET = 1 << 23
"""Elements reduced at once (32 MiB of float32): bounds what a backend copies for transport."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What an optimizer step is divided by, over all micro-batches and ranks."""

    tokens: int
    """Loss tokens."""
    sequences: int
    """Completions with at least one loss token."""


@dataclass(slots=True)
class Tally:
    """What the micro-batches of a step add up to on one rank."""

    loss: float = 0.0
    """Share of the aggregated loss; shares of all micro-batches and ranks add up to it."""
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    gaps: list[Tensor] = field(default_factory=list)
    """Rollout gap of each loss token, on the CPU."""
    trouble: str = ""
    """Why this rank stopped, empty when it did not."""

    def add(self, other: Tally) -> None:
        """Add another rank's or micro-batch's share."""
        self.loss += other.loss
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, value), value)
        self.gaps += other.gaps
        self.trouble = "; ".join(filter(None, (self.trouble, other.trouble)))


def totals(batches: Sequence[Batch], group: Group) -> Totals:
    """Loss tokens and completions of all ranks."""
    tokens = sum(batch.labels_L.shape[0] for batch in batches)
    sequences = sum(int((batch.lengths_N > 0).sum()) for batch in batches)
    if group.size == 1:
        return Totals(tokens=tokens, sequences=sequences)
    ranks = cast("list[tuple[int, int]]", group.gather_objects((tokens, sequences)))
    return Totals(tokens=sum(t for t, _ in ranks), sequences=sum(s for _, s in ranks))


def merge(mine: Tally, group: Group) -> Tally:
    """The tallies of all ranks in one, in the order of ranks, so that every rank holds equal floats."""
    if group.size == 1:
        return mine
    merged = Tally()
    for tally in cast("Iterable[Tally]", group.gather_objects(mine)):
        merged.add(tally)
    return merged


def all_reduce_flat(sum_P: Tensor, group: Group, *, bucket: int = BUCKET) -> None:
    """Sum a flat float32 buffer over the ranks in place, bucket by bucket."""
    if group.size == 1:
        return
    for start in range(0, sum_P.shape[0], bucket):
        group.all_reduce(sum_P[start : start + bucket], op="sum")


def same_everywhere(values: Sequence[float], group: Group) -> bool:
    """Whether every rank gives exactly these values; used to see that ranks start from equal weights."""
    if group.size == 1:
        return True
    mine = torch.tensor(values, dtype=torch.float64).numpy().tobytes()
    return all(theirs == mine for theirs in group.gather_objects(mine))
