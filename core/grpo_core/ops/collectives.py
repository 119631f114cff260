"""Contract of the collectives hook: process groups and the seven collectives that the trainer needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Group(Protocol):
    """A set of ranks. Every member must make the same calls in the same order.

    Tensors are on the collectives' device: any view, of the dtypes that the device computes in, int64 or
    int32, to move also uint8 or bool. What is not changed in place is left as it was, and may be overwritten
    as soon as a call returns. A call that makes no sense on any rank raises ValueError before anything is
    sent, and the group goes on.
    """

    rank: int
    """Rank within the group."""
    size: int

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """In place, the same bits on every rank; op is "sum", "max", "min" or "avg".

        Raises ValueError for another, and for "avg" of integers.
        """
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [size * n, ...] in the order of ranks."""
        ...

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """[size * n, ...] -> this rank's [n, ...] of the reduced whole; ops as in `all_reduce`."""
        ...

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """In place; `src` is a rank within the group. Raises ValueError for another."""
        ...

    def barrier(self) -> None:
        """Nobody leaves before everybody came."""
        ...

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Rows of x by destination -> rows by source [sum(recv_counts), ...]; counts may differ and be zero.

        Raises ValueError for counts that are not one for each rank, or do not add up to the rows of x.
        """
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

        A peer that never comes or dies raises `GrpoError` within the timeout. A world of one needs no store.
        """
        ...

    def group(self, ranks: Sequence[int]) -> Group:
        """Of ascending ranks, called by its members and by nobody else. Raises ValueError for other ranks
        and for a rank that is not among them."""
        ...

    def close(self) -> None:
        """Leave, also after an error; a second call does nothing. `init` may follow with another store."""
        ...
