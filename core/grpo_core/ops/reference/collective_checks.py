"""What every implementation of the collectives must refuse: arguments that make no sense on any rank."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError

REDUCE_OPS = frozenset({"sum", "max", "min", "avg"})


def check_reduction(x: Tensor, op: str) -> None:
    """Raise ValueError for a reduce op that the contract does not name, and for an average of integers."""
    if op not in REDUCE_OPS:
        raise ValueError(f"reduce op must be one of {sorted(REDUCE_OPS)}, not {op!r}")
    if op == "avg" and not x.is_floating_point():
        raise ValueError(f"an average of {x.dtype} would be rounded: reduce a sum and divide")


def check_shares(x: Tensor, size: int) -> None:
    """Raise ValueError for rows that `reduce_scatter` cannot share out evenly."""
    if x.shape[0] % size:
        raise ValueError(f"{x.shape[0]} rows cannot be shared out over {size} ranks")


def check_source(src: int, size: int) -> None:
    """Raise ValueError for a rank outside of the group."""
    if not 0 <= src < size:
        raise ValueError(f"a group of {size} rank(s) has no rank {src}")


def check_counts(x: Tensor, sends: Sequence[int], receives: Sequence[int], size: int) -> None:
    """Raise ValueError for counts of `all_to_all` that fit neither the rows nor the group."""
    fitting = len(sends) == len(receives) == size and sum(sends) == x.shape[0]
    if not fitting or min(*sends, *receives) < 0:
        raise ValueError(
            f"{x.shape[0]} rows against counts {list(sends)} and {list(receives)} for {size} rank(s)"
        )


def check_place(rank: int, world: int, timeout: float) -> None:
    """Raise ConfigError for a rank outside of the world or a timeout that is none."""
    if not 0 <= rank < world or not timeout > 0:
        raise ConfigError(
            f"rank {rank} of {world} cannot join with a timeout of {timeout} s",
            why="ranks go from 0 to world - 1 and the timeout is above 0",
            fix="give each process its own rank",
        )


def check_members(ranks: Sequence[int], rank: int, world: int) -> None:
    """Raise ValueError for ranks that are not ascending ranks of the world with this one among them.

    Any other order would number the ranks of the group in a way that backends do not keep.
    """
    ascending = list(ranks) == sorted(set(ranks))
    if not ascending or rank not in ranks or not set(ranks) <= set(range(world)):
        raise ValueError(f"rank {rank} of {world} cannot make a group of {list(ranks)}")
