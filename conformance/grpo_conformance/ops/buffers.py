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
    inside: Tensor
    """Which elements of the buffer are the tensor's, bool on the host."""

    def damage(self, *, written: bool) -> str:
        """What became of the buffer, in words; empty where only what may change did."""
        now = self.buffer.detach().cpu()
        changed = bits(now) != bits(self.kept)
        changed = changed.view(now.numel(), -1).any(1)
        beyond = changed & ~self.inside
        if bool(beyond.any()):
            first = int(beyond.nonzero()[0])
            start = int(self.inside.nonzero()[0]) if bool(self.inside.any()) else 0
            return (
                f"writes {int(beyond.sum())} elements outside of it, the first {first - start} from its start"
            )
        if not written and bool((changed & self.inside).any()):
            return f"changes {int((changed & self.inside).sum())} of its elements"
        return ""


def guard(x: Tensor, device: torch.device, *, padded: bool = False) -> Guarded:
    """A copy of a host tensor on the device, inside of a buffer of NaN."""
    band = BAND_BYTES // x.element_size()
    rows, width = (x.shape[0], x[0].numel()) if padded and x.dim() > 1 and x.shape[0] else (1, x.numel())
    pitch = width + (GAP if rows > 1 else 0)
    fill = torch.nan if x.is_floating_point() else (0 if x.dtype == torch.bool else INTEGER)
    kept = torch.full((2 * band + rows * pitch,), fill, dtype=x.dtype)
    inside = torch.zeros(kept.shape, dtype=torch.bool)
    middle = slice(band, band + rows * pitch)
    kept[middle].view(rows, pitch)[:, :width] = x.detach().reshape(rows, width)
    inside[middle].view(rows, pitch)[:, :width] = True
    buffer = kept.to(device, copy=True)
    stride = list(x.contiguous().stride())
    if rows > 1:
        stride[0] = pitch
    tensor = buffer.as_strided(tuple(x.shape), tuple(stride), band)
    return Guarded(tensor=tensor, buffer=buffer, kept=kept, inside=inside)


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
