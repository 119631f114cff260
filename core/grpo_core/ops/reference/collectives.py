"""Collectives of a single process: every group has one rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError
from .collective_checks import REDUCE_OPS, check_counts, check_reduction, check_source


class OneRank:
    """Reference of `Group` for one rank."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """See `Group.all_reduce`."""
        check_reduction(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group.all_gather`."""
        return x.clone()

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """See `Group.reduce_scatter`."""
        check_reduction(x, op)
        return x.clone()

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """See `Group.broadcast`."""
        check_source(src, self.size)

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """See `Group.all_to_all`."""
        check_counts(x, send_counts, recv_counts, self.size)
        check_counts(x, recv_counts, send_counts, self.size)
        return x.clone()

    def gather_objects(self, obj: object) -> list[object]:
        """See `Group.gather_objects`."""
        return [obj]


class SingleProcess:
    """Reference of `comm.collectives`."""

    backend = "none"
    reduce_ops = REDUCE_OPS

    def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
        """Raises ConfigError for more than one process."""
        if (rank, world) != (0, 1):
            raise ConfigError(
                f"rank {rank} of {world} processes cannot join",
                why="these collectives serve a single process",
                fix="install a plugin with collectives for this device, or start one process",
            )

    def group(self, ranks: Sequence[int]) -> OneRank:
        """The group of rank 0. Raises ValueError for other ranks."""
        if list(ranks) != [0]:
            raise ValueError(f"a single process has rank 0 only, not {list(ranks)}")
        return OneRank()

    def close(self) -> None:
        """Nothing to close."""
