"""All parameters of the policy in one buffer, with exact float32 masters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import masters

ALIGN = 64
"""Elements; every parameter starts at a multiple (128 bytes in bfloat16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one parameter lies in a flat buffer."""

    name: str
    shape: tuple[int, ...]
    start: int
    decays: bool
    """Whether weight decay applies: to matrices and the experts' stacks of them, not to vectors."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A range of a flat buffer with one weight decay, small enough to stay in a cache."""

    start: int
    stop: int
    decays: bool


def layout(named: Mapping[str, Tensor]) -> tuple[Slot, ...]:
    """Slots in the order of names, those that decay first."""
    slots: list[Slot] = []
    place = 0
    for decays in (True, False):
        for name, tensor in named.items():
            if (tensor.ndim >= 2) == decays:
                slots.append(Slot(name=name, shape=tuple(tensor.shape), start=place, decays=decays))
                place = -(-slots[-1].stop // ALIGN) * ALIGN
    return tuple(slots)


def pieces(slots: tuple[Slot, ...], size: int) -> Iterator[Piece]:
    """The whole buffer in ranges of at most `size` elements."""
    for decays in (True, False):
        mine = [slot for slot in slots if slot.decays == decays]
        if mine:
            first, last = mine[0].start, mine[-1].stop
            for start in range(first, last, size):
                yield Piece(start=start, stop=min(start + size, last), decays=decays)


class FlatParameters:
    """The parameters of a module, moved into one buffer `weights_P` of the compute dtype.

    In float32 they are their own masters; in bfloat16 `remainder_P` (int16) holds the lower half of each
    master (see `masters`). Both are zero between parameters.
    """

    def __init__(self, module: nn.Module, *, device: torch.device, dtype: torch.dtype) -> None:
        named = dict(module.named_parameters())
        self.slots = layout(named)
        self.frozen: Mapping[str, Tensor] = dict(module.named_buffers())
        """Tensors of the module that belong to a checkpoint and are not trained, by neutral name."""
        total = max(slot.stop for slot in self.slots)
        self.weights_P = torch.zeros(total, device=device, dtype=dtype)
        split = dtype == torch.bfloat16
        self.remainder_P = torch.zeros(total, device=device, dtype=torch.int16) if split else None
        self.parameters = [named[slot.name] for slot in self.slots]
        views = self.views(self.weights_P)
        for slot, parameter in zip(self.slots, self.parameters, strict=True):
            parameter.data = views[slot.name]

    @property
    def numel(self) -> int:
        """Parameters, without the gaps between them."""
        return sum(math.prod(slot.shape) for slot in self.slots)

    def views(self, flat_P: Tensor) -> dict[str, Tensor]:
        """Parameter-shaped views of a buffer with this layout, by neutral name."""
        return {slot.name: flat_P[slot.start : slot.stop].view(slot.shape) for slot in self.slots}

    def whole(self, flat_P: Tensor) -> dict[str, Tensor]:
        """The views of a buffer and the frozen tensors: everything that a checkpoint holds."""
        return {**self.views(flat_P), **self.frozen}

    def fill(self, load: Callable[[Mapping[str, Tensor]], None], scratch_P: Tensor) -> None:
        """Take masters from `load(whole)`, which fills float32 tensors by name; no precision is lost.

        `scratch_P` is a float32 buffer of this layout, all zero before and after.
        """
        if self.remainder_P is None:
            load(self.whole(self.weights_P))
            return
        load(self.whole(scratch_P))
        masters.split(scratch_P, self.weights_P, self.remainder_P)
        scratch_P.zero_()

    def read_masters(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """float32 masters of a range: a view where they are the weights, else written to `scratch`."""
        if self.remainder_P is None:
            return self.weights_P[start:stop]
        masters.join(self.weights_P[start:stop], self.remainder_P[start:stop], scratch[: stop - start])
        return scratch[: stop - start]

    def write_masters(self, start: int, stop: int, masters_P: Tensor) -> None:
        """Take back what `read_masters` gave. Destroys `masters_P` where it is not a view."""
        if self.remainder_P is not None:
            masters.split(masters_P, self.weights_P[start:stop], self.remainder_P[start:stop])
