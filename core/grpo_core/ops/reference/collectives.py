"""Collectives of a single process: every group has one rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError

REDUCE_OPS = frozenset({"sum", "max", "min", "avg"})


def check_reduce_op(op: str) -> None:
    """Raise ValueError for a reduce op that the contract does not name."""
    if op not in REDUCE_OPS:
        raise ValueError(f"reduce op must be one of {sorted(REDUCE_OPS)}, not {op!r}")


class OneRank:
    """Reference of `Group` for one rank."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """See `Group.all_reduce`."""
        check_reduce_op(op)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group.all_gather`."""
        return x.clone()

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """See `Group.reduce_scatter`."""
        check_reduce_op(op)
        return x.clone()

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """See `Group.broadcast`."""
        if src != 0:
            raise ValueError(f"a group of one rank has no rank {src}")

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """See `Group.all_to_all`."""
        if list(send_counts) != [x.shape[0]] or list(recv_counts) != [x.shape[0]]:
            raise ValueError(f"{x.shape[0]} rows against counts {list(send_counts)} and {list(recv_counts)}")
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
