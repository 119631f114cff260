"""Contract of the collectives hook: process groups and the seven collectives that the trainer needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Group(Protocol):
    """A set of ranks. Every member must make the same calls in the same order."""

    rank: int
    """Rank within the group."""
    size: int

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """In place; op is "sum", "max", "min" or "avg". Raises ValueError for another."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [size * n, ...] in the order of ranks."""
        ...

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """[size * n, ...] -> this rank's [n, ...] of the reduced whole."""
        ...

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """In place; `src` is a rank within the group."""
        ...

    def barrier(self) -> None: ...

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Rows of x by destination; counts may differ and be zero. Returns [sum(recv_counts), ...]."""
        ...

    def gather_objects(self, obj: object) -> list[object]:
        """Every rank's picklable object, in the order of ranks, on every rank."""
        ...


class Collectives(Protocol):
    """A communication backend."""

    backend: str
    """"gloo", "nccl", "hccl", ... or "none" for a single process."""
    reduce_ops: frozenset[str]
    """Native reduce ops; a missing "avg" is a sum and a division, and the plan says so."""

    def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
        """Join; `store` is "tcp://host:port" or "file:///path", timeout in seconds for every later call.

        A peer that never comes or dies raises `GrpoError` within the timeout.
        """
        ...

    def group(self, ranks: Sequence[int]) -> Group: ...

    def close(self) -> None: ...
