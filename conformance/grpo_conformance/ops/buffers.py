"""Inputs on the device between guard bands, so that reads and writes beyond them are noticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BAND_BYTES = 512
"""On either side: a row or more of most tensors, and a multiple of every vector's alignment."""
GAP = 8
"""Elements between the rows of a padded input."""
INTEGER = -77
"""What the bands of integer tensors hold; those of floating tensors hold NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    """A tensor within its buffer."""

    tensor: Tensor
    """The view that an op gets."""
    buffer: Tensor
    kept: Tensor
    """What the whole buffer held, on the host."""
    rows: tuple[int, int, int]
    """The tensor's elements in the buffer behind the first band: rows, elements of each, and from one row's
    start to the next's."""

    def damage(self, *, written: bool) -> str:
        """What became of the buffer, in words; empty where only what may change did."""
        now, before = bits(self.buffer.detach().cpu()), bits(self.kept)
        if torch.equal(now, before):
            return ""
        changed = (now != before).view(self.kept.numel(), -1).any(1)
        inside = self.inside()
        beyond = changed & ~inside
        if bool(beyond.any()):
            first = int(beyond.nonzero()[0])
            start = int(inside.nonzero()[0]) if bool(inside.any()) else 0
            return (
                f"writes {int(beyond.sum())} elements outside of it, the first {first - start} from its start"
            )
        if not written and bool((changed & inside).any()):
            return f"changes {int((changed & inside).sum())} of its elements"
        return ""

    def inside(self) -> Tensor:
        """Which elements of the buffer are the tensor's, bool on the host."""
        rows, width, pitch = self.rows
        band = BAND_BYTES // self.kept.element_size()
        found = torch.zeros(self.kept.shape, dtype=torch.bool)
        found[band : band + rows * pitch].view(rows, pitch)[:, :width] = True
        return found


def guard(x: Tensor, device: torch.device, *, padded: bool = False) -> Guarded:
    """A copy of a host tensor on the device, inside of a buffer of NaN."""
    band = BAND_BYTES // x.element_size()
    rows, width = (x.shape[0], x[0].numel()) if padded and x.dim() > 1 and x.shape[0] else (1, x.numel())
    pitch = width + (GAP if rows > 1 else 0)
    fill = torch.nan if x.is_floating_point() else (0 if x.dtype == torch.bool else INTEGER)
    kept = torch.full((2 * band + rows * pitch,), fill, dtype=x.dtype)
    kept[band : band + rows * pitch].view(rows, pitch)[:, :width] = x.detach().reshape(rows, width)
    buffer = kept.to(device, copy=True)
    stride = list(x.contiguous().stride())
    if rows > 1:
        stride[0] = pitch
    tensor = buffer.as_strided(tuple(x.shape), tuple(stride), band)
    return Guarded(tensor=tensor, buffer=buffer, kept=kept, rows=(rows, width, pitch))


def guard_all(
    tensors: Mapping[str, Tensor], device: torch.device, padded: Iterable[str] = ()
) -> dict[str, Guarded]:
    """Every input of a call; no two share a buffer."""
    rows = frozenset(padded)
    return {name: guard(x, device, padded=name in rows) for name, x in tensors.items()}


def damage(guarded: Mapping[str, Guarded], written: Iterable[str]) -> str:
    """The first thing wrong with the buffers of a call, in words."""
    may = frozenset(written)
    for name, one in guarded.items():
        found = one.damage(written=name in may)
        if found:
            return f"{name}: the call {found}"
    return ""


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its elements."""
    return x.reshape(-1).contiguous().view(torch.uint8)
