"""Questions about `all_reduce` and `reduce_scatter`, answered by every rank for itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .draws import INTEGERS, bound, draw, reduced
from .ledger import Ledger
from .rank import Seat

OPS = ("sum", "max", "min", "avg")
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "one": (1,), "odd": (7,), "matrix": (5, 33), "empty": (0,), "no rows": (0, 3),
    "three axes": (2, 3, 5), "above 2^16": (70001,),
}  # fmt: skip
FEW = ("scalar", "odd", "matrix", "empty")
ROWS: dict[str, tuple[int, ...]] = {"one": (1,), "none": (0, 3), "matrix": (3, 5), "three axes": (2, 3, 5)}
"""Shapes of one rank's share."""
CANARY = 77


def all_reduce(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """Every dtype, reduce op and shape; slices and strided views, whose surroundings stay as they are."""
    ledger = Ledger()
    for dtype, op in pairs(seat):
        for shape in FEW if few else SHAPES:
            name = f"all_reduce {op} {dtype} {shape}"
            parts = [draw(seed, rank, name, dtype, SHAPES[shape]) for rank in range(seat.world)]
            x = parts[seat.rank].to(seat.device, copy=True)
            seat.group.all_reduce(x, op=op)
            judge(ledger, name, x, parts, op)
        _views(seat, ledger, seed, dtype, op)
    if seat.world > 1:
        _not_finite(seat, ledger)
    return ledger.told()


def _views(seat: Seat, ledger: Ledger, seed: int, dtype: str, op: str) -> None:
    """Parts of a larger tensor: those of a flat gradient, a transposed matrix, a column, every third row."""
    for view in ("slice", "transposed", "column", "rows"):
        name = f"all_reduce {op} {dtype} {view}"
        parts = [draw(seed, rank, name, dtype, (6, 4)) for rank in range(seat.world)]
        # The seventh and eighth row belong to nobody.
        whole = torch.full((8, 4), CANARY, dtype=parts[0].dtype, device=seat.device)
        whole[:6] = parts[seat.rank].to(seat.device)
        seat.group.all_reduce(_part(whole, view), op=op)
        judge(ledger, name, _part(whole, view), [_part(_padded(part), view) for part in parts], op)
        after, before = whole.cpu(), _padded(parts[seat.rank])
        _part(after, view).zero_()
        _part(before, view).zero_()
        ledger.exact(f"{name}, around it", after, before)


def _part(whole: Tensor, view: str) -> Tensor:
    if view == "slice":
        return whole.view(-1)[3:21]
    if view == "transposed":
        return whole[:6].t()
    return whole[:6, 1] if view == "column" else whole[:6:3]


def _padded(part: Tensor) -> Tensor:
    return torch.cat([part, torch.full((2, 4), CANARY, dtype=part.dtype)])


def _not_finite(seat: Seat, ledger: Ledger) -> None:
    """A NaN or an infinity of one rank reaches all: a gradient that is not finite must not be lost."""
    for dtype in seat.dtypes:
        for op in ("sum", "avg"):
            x = torch.zeros(5, dtype=getattr(torch, dtype))
            if seat.rank == seat.world - 1:
                x[0], x[1], x[2], x[3] = float("nan"), float("inf"), float("-inf"), float("inf")
            if seat.rank == 0:
                x[3] = float("-inf")
            x = x.to(seat.device)
            seat.group.all_reduce(x, op=op)
            got = [str(value) for value in x.cpu().tolist()]
            right = got == ["nan", "inf", "-inf", "nan", "0.0"]
            ledger.claim(f"all_reduce {op} {dtype}, not finite", right, f"{got} of nan, inf, -inf, nan, 0.0")


def reduce_scatter(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """This rank's rows of the reduced whole, of plain and of transposed inputs, which stay as they are."""
    ledger = Ledger()
    for dtype, op in pairs(seat):
        for shape, size in ROWS.items():
            name = f"reduce_scatter {op} {dtype} {shape}"
            rows = (seat.world * size[0], *size[1:])
            parts = [draw(seed, rank, name, dtype, rows) for rank in range(seat.world)]
            strided = len(size) == 2 and not few
            x = parts[seat.rank].to(seat.device, copy=True)
            x = x.t().contiguous().t() if strided else x
            y = seat.group.reduce_scatter(x, op=op)
            ledger.exact(f"{name}, input after it", x, parts[seat.rank])
            x.zero_()
            first = seat.rank * size[0]
            judge(ledger, name, y, [part[first : first + size[0]] for part in parts], op)
    return ledger.told()


def emulations(seat: Seat, *, seed: int, few: bool) -> dict[str, Any]:
    """An average that is not native is exactly a sum and a division.

    The inputs are whole numbers so small that every order of sums is exact in every dtype, so that there is
    one right answer: their sum over n, rounded once.
    """
    ledger = Ledger()
    if "avg" in seat.collectives.reduce_ops:
        return ledger.told() | {"native": True}
    for dtype in seat.dtypes:
        kind: torch.dtype = getattr(torch, dtype)
        for size in (3, 64) if few else (1, 3, 64, 1000):
            name = f"average of whole numbers {dtype} {size}"
            generator = torch.Generator().manual_seed(seed * 1000 + size)
            shape = (seat.world, seat.world * size)
            parts = torch.randint(-60, 61, shape, generator=generator)
            wanted = (parts.sum(0).double() / seat.world).to(kind)
            x = parts[seat.rank].to(kind).to(seat.device)
            share = seat.group.reduce_scatter(x, op="avg")
            seat.group.all_reduce(x, op="avg")
            ledger.exact(name, x, wanted)
            mine = wanted[seat.rank * size : (seat.rank + 1) * size]
            ledger.exact(f"{name}, scattered", share, mine)
    return ledger.told()


def pairs(seat: Seat) -> Iterator[tuple[str, str]]:
    """Every dtype with every reduce op that there is for it."""
    for dtype in (*seat.dtypes, *INTEGERS):
        for op in OPS:
            if op != "avg" or dtype not in INTEGERS:
                yield dtype, op


def judge(ledger: Ledger, name: str, got: Tensor, parts: list[Tensor], op: str) -> None:
    """Floats that were added within the derived bound, everything else to the bit."""
    wanted = reduced(parts, op)
    if op in ("max", "min") or not parts[0].is_floating_point():
        ledger.exact(name, got, wanted)
    else:
        ledger.near(name, got, wanted, bound(parts, op), parts[0].dtype)
