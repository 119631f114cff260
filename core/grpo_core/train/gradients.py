"""Gradients of one optimizer step: summed in float32 over micro-batches and ranks."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .parallel import all_reduce_flat

if TYPE_CHECKING:
    from ..ops.collectives import Group
    from ..ops.memory import Memory
    from .parameters import FlatParameters

NORM_PIECE = 1 << 20
"""Elements whose squares are summed at once."""


def square_sums(tensors: Iterable[Tensor]) -> list[float]:
    """Sums of squares of contiguous tensors, one for each piece of `NORM_PIECE` elements; read in one go."""
    norms = [
        # Not every device has float64; a piece is short enough for float32 then.
        torch.linalg.vector_norm(piece, dtype=torch.float64 if piece.device.type == "cpu" else torch.float32)
        for tensor in tensors
        for piece in torch.split(tensor.reshape(-1), NORM_PIECE)
    ]
    return [norm * norm for norm in torch.stack(norms).tolist()]


class Gradients:
    """Takes each parameter's gradient the moment it is complete.

    With several micro-batches or ranks it is added to one flat float32 buffer and its own memory freed, so
    that gradients in the compute dtype never pile up. With a single micro-batch there is nothing to add:
    the gradient stays where autograd left it, and the buffer is never allocated.
    """

    def __init__(self, flat: FlatParameters, memory: Memory) -> None:
        self.flat = flat
        self.starts = [slot.start for slot in flat.slots]
        self.memory = memory
        self.sum_P: Tensor | None = None
        self.views: list[Tensor] = []
        self.seen: set[int] = set()
        self.single = True
        for index, parameter in enumerate(flat.parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]

    def begin(self, *, single: bool) -> None:
        """Start a step; `single` promises one micro-batch on one rank."""
        self.clear()
        self.single = single
        if not single and self.sum_P is None:
            self.sum_P = torch.zeros(
                self.flat.weights_P.shape, device=self.flat.weights_P.device, dtype=torch.float32
            )
            views = self.flat.views(self.sum_P)
            self.views = [views[slot.name] for slot in self.flat.slots]
            self.memory.hold("gradients", [self.sum_P])

    def clear(self) -> None:
        """Forget the gradients of the step."""
        self.seen.clear()
        for parameter in self.flat.parameters:
            parameter.grad = None

    def finish(self, group: Group) -> None:
        """Complete the sum: zeros for what no micro-batch touched, then over all ranks."""
        if self.single:
            for parameter in self.flat.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return
        assert self.sum_P is not None
        for index, view in enumerate(self.views):
            if index not in self.seen:
                view.zero_()
        all_reduce_flat(self.sum_P, group)

    def norm(self) -> float:
        """Euclidean norm over all parameters, squares summed in float64 over short float32 pieces."""
        return math.sqrt(sum(square_sums(self._all())))

    def read(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """float32 gradient of a range of the flat layout: a view of the sum, or written to `scratch`."""
        if not self.single:
            assert self.sum_P is not None
            return self.sum_P[start:stop]
        out = scratch[: stop - start].zero_()
        first = bisect_right(self.starts, start) - 1
        for index in range(first, bisect_left(self.starts, stop)):
            slot, gradient = self.flat.slots[index], self.flat.parameters[index].grad
            low, high = max(start, slot.start), min(stop, slot.stop)
            if low < high and gradient is not None:
                part = gradient.reshape(-1)[low - slot.start : high - slot.start]
                out[low - start : high - start].copy_(part)
        return out

    def _all(self) -> list[Tensor]:
        if not self.single:
            return self.views
        return [p.grad for p in self.flat.parameters if p.grad is not None]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if self.single:
                return
            gradient = parameter.grad
            assert gradient is not None
            if index in self.seen:
                self.views[index].add_(gradient)
            else:
                self.views[index].copy_(gradient)
                self.seen.add(index)
            parameter.grad = None

        return take
