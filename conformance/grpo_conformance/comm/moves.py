"""Questions about what only moves: gathering, broadcasts and all-to-all. Every bit must arrive."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from .draws import MOVED, draw, with_specials
from .ledger import Ledger
from .rank import Seat

SHAPES: dict[str, tuple[int, ...]] = {
    "one": (1,), "odd": (7,), "matrix": (5, 33), "three axes": (2, 3, 5), "empty": (0,), "no rows": (0, 3),
    "no columns": (3, 0), "above 2^16": (1001, 70),
}  # fmt: skip
FEW = ("odd", "matrix", "no rows")
STRIDED = "transposed"
ROW: dict[str, tuple[int, ...]] = {"numbers": (), "rows": (9,), "blocks": (2, 3)}
"""Shapes of one row of an all-to-all."""


def all_gather(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Every dtype and shape, in the order of ranks; the input stays, and may change right after the call."""
    ledger = Ledger()
    for dtype in (*seat.dtypes, *MOVED):
        for shape in (*(FEW if few else SHAPES), STRIDED):
            name = f"all_gather {dtype} {shape}"
            parts = [
                with_specials(draw(seed, rank, name, dtype, SHAPES.get(shape, (6, 4))))
                for rank in range(seat.world)
            ]
            x = _placed(parts[seat.rank], seat, shape)
            y = seat.group.all_gather(x)
            ledger.exact(f"{name}, input after it", x, parts[seat.rank])
            x.zero_()
            ledger.exact(name, y, torch.cat(parts))
    return ledger.told()


def broadcast(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """From every rank, in place, of every dtype and shape."""
    ledger = Ledger()
    for dtype in (*seat.dtypes, *MOVED):
        for shape in ("scalar", *(FEW if few else SHAPES), STRIDED):
            for src in range(seat.world):
                name = f"broadcast from {src} {dtype} {shape}"
                size = () if shape == "scalar" else SHAPES.get(shape, (6, 4))
                x = _placed(with_specials(draw(seed, seat.rank, name, dtype, size)), seat, shape)
                seat.group.broadcast(x, src=src)
                ledger.exact(name, x, with_specials(draw(seed, src, name, dtype, size)))
    return ledger.told()


def all_to_all(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Counts of many kinds, zeros among them, with rows of several shapes and every dtype."""
    ledger = Ledger()
    tables = count_tables(seat.world, seed)
    for dtype in (*seat.dtypes, *MOVED):
        for kind, counts in tables.items():
            for row in ("rows",) if few or dtype in ("uint8", "bool") else ROW:
                _exchange(seat, ledger, seed, dtype, kind, counts, row)
    for kind in ("anything", "one sends all"):
        _exchange(seat, ledger, seed, "float32", kind, tables[kind], STRIDED)
    big = [[1 + 997 * ((rank + 2 * to) % 3) for to in range(seat.world)] for rank in range(seat.world)]
    _exchange(seat, ledger, seed, "bfloat16", "many rows", big, "rows")
    return ledger.told()


def _exchange(
    seat: Seat, ledger: Ledger, seed: int, dtype: str, kind: str, counts: list[list[int]], row: str
) -> None:
    name = f"all_to_all {dtype} {kind} {row}"
    width = ROW.get(row, (9,))
    parts = [
        with_specials(draw(seed, rank, name, dtype, (sum(counts[rank]), *width)))
        for rank in range(seat.world)
    ]
    mine = parts[seat.rank]
    x = _placed(mine, seat, row)
    y = seat.group.all_to_all(
        x, send_counts=counts[seat.rank], recv_counts=[sent[seat.rank] for sent in counts]
    )
    ledger.exact(f"{name}, input after it", x, mine)
    x.zero_()
    rows = []
    for part, sent in zip(parts, counts, strict=True):
        first = sum(sent[: seat.rank])
        rows.append(part[first : first + sent[seat.rank]])
    ledger.exact(f"{name}, counts {counts}", y, torch.cat(rows))


def count_tables(world: int, seed: int) -> dict[str, list[list[int]]]:
    """Rows from each rank (outer) to each rank (inner), by what is particular about them."""
    ranks = range(world)
    chance = random.Random(seed)
    ring = [[0] * world for _ in ranks]
    for rank in ranks:
        ring[rank][(rank + 1) % world] = rank + 1
    return {
        "the same everywhere": [[2] * world for _ in ranks],
        "nothing at all": [[0] * world for _ in ranks],
        "all to the last": [[rank + 1 if to == world - 1 else 0 for to in ranks] for rank in ranks],
        "one sends all": [[to + 1 if rank == 0 else 0 for to in ranks] for rank in ranks],
        "to itself": [[3 if to == rank else 0 for to in ranks] for rank in ranks],
        # Neighbours to the right only: a transposed table sends to the left.
        "in a ring": ring,
        "anything": [[chance.choice((0, 0, 1, 2, 7)) for _ in ranks] for _ in ranks],
    }


def gather_objects(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Objects of unlike kinds and sizes in the order of ranks, tensors of the host among them."""
    ledger = Ledger()
    for kind in ("small", "unlike", "large on one", "tensor"):
        got = seat.group.gather_objects(_object(kind, seat.rank))
        wanted = [_object(kind, rank) for rank in range(seat.world)]
        same = len(got) == len(wanted) and all(map(_equal, got, wanted))
        ledger.claim(f"gather_objects {kind}", same, f"{str(got)[:200]} instead of {str(wanted)[:200]}")
    return ledger.told()


def _object(kind: str, rank: int) -> Any:
    if kind == "small":
        return rank
    if kind == "unlike":
        return (None, {"rank": rank, "a": [1, (2.5, b"x")]}, [], "ünlike")[rank % 4]
    if kind == "large on one":
        return b"0123456789abcdef" * (1 << 16) if rank == 1 else b""
    return torch.arange(rank * 3, dtype=torch.float32)


def _equal(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return isinstance(got, Tensor) and torch.equal(got, wanted)
    return type(got) is type(wanted) and bool(got == wanted)


def _placed(x: Tensor, seat: Seat, shape: str) -> Tensor:
    """On the device, apart from the original; for a transposed one with rows that are not in one piece."""
    there = x.to(seat.device, copy=True)
    return there.t().contiguous().t() if shape == STRIDED else there
