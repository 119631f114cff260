"""Questions about groups, order, barriers, refusals and leaving."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_core.plugins import Raised, attempt

from .ledger import Ledger
from .rank import Seat, join

PARTS: dict[int, tuple[tuple[tuple[int, ...], ...], ...]] = {
    1: (((0,),),),
    2: (((0,), (1,)), ((0, 1),)),
    3: (((0, 2), (1,)), ((0, 1), (2,)), ((1, 2),)),
    4: (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 2, 3), (1,)), ((1, 3),)),
}
"""Groups by size of the world; those of one row are used at the same time."""
LATE = 0.05
"""Seconds by which one rank is behind."""


def declared(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """The attributes of the contract."""
    ledger, comm, group = Ledger(), seat.collectives, seat.group
    known = {"sum", "max", "min", "avg"}
    ledger.claim("backend", isinstance(comm.backend, str) and comm.backend != "", repr(comm.backend))
    ledger.claim("reduce_ops", isinstance(comm.reduce_ops, frozenset), type(comm.reduce_ops).__name__)
    ledger.claim("reduce_ops are known", {"sum"} <= set(comm.reduce_ops) <= known, sorted(comm.reduce_ops))
    ledger.claim("rank and size", (group.rank, group.size) == (seat.rank, seat.world), group.size)
    return ledger.told() | {"reduce_ops": sorted(comm.reduce_ops), "backend": comm.backend}


def groups(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Groups at the same time, overlapping and made twice: each sees its own members and nobody else."""
    ledger = Ledger()
    made: list[tuple[int, tuple[int, ...], Any]] = []
    for number, row in enumerate((*PARTS[seat.world], PARTS[seat.world][0])):
        made += [(number, ranks, seat.collectives.group(list(ranks))) for ranks in row if seat.rank in ranks]
    for number, ranks, group in made:
        place = ranks.index(seat.rank)
        found = (group.rank, group.size)
        ledger.claim(f"rank and size in {ranks}", found == (place, len(ranks)), found)
        # Members are out of step with one another and with the other groups of the same time.
        time.sleep(LATE * ((seat.rank + number) % 2) / 5)
        _within_one(seat, ledger, ranks, group, number)
    _, ranks, group = made[0]
    _alternating(seat, ledger, ranks, group)
    return ledger.told()


def _within_one(seat: Seat, ledger: Ledger, ranks: tuple[int, ...], group: Any, number: int) -> None:
    name, size, place = f"group {number} of {ranks}", len(ranks), ranks.index(seat.rank)
    # A sum of powers of ten tells who took part, and how often.
    x = _whole(seat, 10**seat.rank)
    group.all_reduce(x, op="sum")
    ledger.exact(f"{name}: members", x, torch.tensor([float(sum(10**rank for rank in ranks))]))
    ledger.exact(
        f"{name}: all_gather", group.all_gather(_whole(seat, seat.rank)), torch.tensor(ranks).float()
    )
    for src, rank in enumerate(ranks):
        x = _whole(seat, seat.rank + 100 * number)
        group.broadcast(x, src=src)
        ledger.exact(f"{name}: broadcast from {src}", x, torch.tensor([rank + 100.0 * number]))
    share = group.reduce_scatter(_whole(seat, *range(size)), op="sum")
    ledger.exact(f"{name}: reduce_scatter", share, torch.tensor([float(size * place)]))
    # Rank a of the group sends a + 1 rows to each.
    got = group.all_to_all(
        _whole(seat, *[seat.rank] * (size * (place + 1))), send_counts=[place + 1] * size,
        recv_counts=[source + 1 for source in range(size)],
    )  # fmt: skip
    rows = [float(rank) for source, rank in enumerate(ranks) for _ in range(source + 1)]
    ledger.exact(f"{name}: all_to_all", got, torch.tensor(rows))
    said = group.gather_objects(seat.rank)
    ledger.claim(f"{name}: gather_objects", said == list(ranks), said)
    group.barrier()


def _alternating(seat: Seat, ledger: Ledger, ranks: tuple[int, ...], group: Any) -> None:
    """Calls of a part and of the whole in turn, the parts with unlike numbers of them."""
    for turn in range(10):
        x, y = _whole(seat, turn + 1), _whole(seat, turn + 1)
        for _ in range(1 + ranks[0]):
            group.all_reduce(x, op="max")
        group.all_reduce(x, op="sum")
        seat.group.all_reduce(y, op="sum")
        ledger.exact(f"turn {turn} of {ranks}", x, torch.tensor([float(len(ranks) * (turn + 1))]))
        ledger.exact(f"turn {turn} of all", y, torch.tensor([float(seat.world * (turn + 1))]))


def order(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Many small calls in a row with ranks out of step: each pairs with the peers' call of the same turn.

    Inputs are overwritten as soon as a call returns, and results looked at when all calls were made.
    """
    ledger, chance, late = Ledger(), random.Random(seed), random.Random(seed * 31 + seat.rank)
    kinds = ("all_reduce", "all_gather", "broadcast", "all_to_all", "reduce_scatter", "barrier")
    late_results: list[tuple[str, Tensor, Tensor]] = []
    for turn in range(60 if few else 300):
        kind = chance.choice(kinds)
        if late.random() < 0.1:
            time.sleep(late.random() * LATE / 10)
        values = [1000 * rank + turn for rank in range(seat.world)]
        x = _whole(seat, *[values[seat.rank]] * seat.world)
        got, wanted = _turn(seat, kind, x, values, chance.randrange(seat.world))
        late_results.append((f"turn {turn}, {kind}", got.clone(), torch.tensor(wanted).float()))
        x.zero_()
    for name, got, right in late_results:
        ledger.exact(name, got, right)
    return ledger.told()


def _turn(seat: Seat, kind: str, x: Tensor, values: list[int], src: int) -> tuple[Tensor, list[int]]:
    group, world = seat.group, seat.world
    if kind == "all_reduce":
        group.all_reduce(x, op="sum")
        return x, [sum(values)] * world
    if kind == "broadcast":
        group.broadcast(x, src=src)
        return x, [values[src]] * world
    if kind == "all_gather":
        return group.all_gather(x), [value for value in values for _ in range(world)]
    if kind == "reduce_scatter":
        return group.reduce_scatter(x, op="max"), [max(values)]
    if kind == "all_to_all":
        return group.all_to_all(x, send_counts=[1] * world, recv_counts=[1] * world), values
    group.barrier()
    return x, [values[seat.rank]] * world


def barrier(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """When this rank came to and left each of several barriers, one rank in turn being late.

    The times are of the one clock of the machine; the suite compares them.
    """
    came, left = [], []
    for turn in range(2 * seat.world):
        if turn % seat.world == seat.rank:
            time.sleep(LATE)
        came.append(time.monotonic())
        seat.group.barrier()
        left.append(time.monotonic())
    return Ledger().told() | {"came": came, "left": left}


def refusals(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Calls that make no sense on any rank are ValueErrors on all, and the group goes on."""
    ledger, group, n = Ledger(), seat.group, seat.world
    x = _whole(seat, *range(n))
    ones = [1] * n
    calls: dict[str, Callable[[], object]] = {
        "all_reduce by an unknown op": lambda: group.all_reduce(x, op="product"),
        "reduce_scatter by an unknown op": lambda: group.reduce_scatter(x, op="mean"),
        "an average of integers": lambda: group.all_reduce(x.long(), op="avg"),
        "broadcast from beyond the last": lambda: group.broadcast(x, src=n),
        "broadcast from before the first": lambda: group.broadcast(x, src=-1),
        "one count too many": lambda: group.all_to_all(x, send_counts=[*ones, 0], recv_counts=ones),
        "counts of too many rows": lambda: group.all_to_all(x, send_counts=[2] * n, recv_counts=ones),
        "a group with a stranger": lambda: seat.collectives.group([*range(n), n]),
        "an empty group": lambda: seat.collectives.group([]),
        "a rank twice": lambda: seat.collectives.group([0] * (n + 1)),
    }
    if n > 1:
        calls["rows that cannot be shared"] = lambda: group.reduce_scatter(x[:-1], op="sum")
        calls["descending ranks"] = lambda: seat.collectives.group(list(range(n))[::-1])
        others = [rank for rank in range(n) if rank != seat.rank]
        calls["a group of the others"] = lambda: seat.collectives.group(others)
    for name, call in calls.items():
        said = attempt(call)
        refused = isinstance(said, Raised) and isinstance(said.error, ValueError)
        ledger.claim(name, refused, f"{said} instead of a ValueError")
    y = _whole(seat, 2)
    group.all_reduce(y, op="sum")
    ledger.exact("all_reduce after refusals", y, torch.tensor([2.0 * n]))
    ledger.exact("what was refused", x, torch.arange(n).float())
    return ledger.told()


def rejoin(seat: Seat, *, seed: int, few: bool, store: str, timeout: float) -> dict[str, Any]:
    """Leave, twice, and meet again at another store."""
    ledger = Ledger()
    seat.collectives.close()
    seat.collectives.close()
    join(seat, rank=seat.rank, world=seat.world, store=store, timeout=timeout)
    x = _whole(seat, seat.rank)
    seat.group.all_reduce(x, op="sum")
    ledger.exact("all_reduce after meeting again", x, torch.tensor([float(sum(range(seat.world)))]))
    return ledger.told()


def _whole(seat: Seat, *values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=seat.device)
