"""Gradients of one optimizer step: summed in float32 over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .parallel import all_reduce_flat

if TYPE_CHECKING:
    from ..ops.collectives import Group
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
    """Takes each parameter's gradient into one flat buffer the moment it is complete.

    Its own memory is freed at once, so that gradients neither pile up in the compute dtype nor lie between
    activations and keep their memory from being given back. The buffer is float32; as long as no step had
    more than one micro-batch on one rank there is nothing to add up, and it has the compute dtype.
    """

    def __init__(self, flat: FlatParameters) -> None:
        self.flat = flat
        self.sum_P: Tensor | None = None
        self.views: list[Tensor] = []
        self.seen: set[int] = set()
        for index, parameter in enumerate(flat.parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]

    def begin(self, *, single: bool) -> None:
        """Start a step; `single` promises one micro-batch on one rank."""
        self.seen.clear()
        weights_P = self.flat.weights_P
        dtype = weights_P.dtype if single else torch.float32
        if self.sum_P is None or (self.sum_P.dtype != dtype and not single):
            self.release()
            self.sum_P = torch.zeros(weights_P.shape, device=weights_P.device, dtype=dtype)
            views = self.flat.views(self.sum_P)
            self.views = [views[slot.name] for slot in self.flat.slots]

    def release(self) -> None:
        """Free the buffer; the next step makes another."""
        self.sum_P, self.views = None, []

    def nbytes(self) -> int:
        """Bytes held between steps."""
        return 0 if self.sum_P is None else self.sum_P.nbytes

    def finish(self, group: Group) -> None:
        """Complete the sum: zeros for what no micro-batch touched, then over all ranks."""
        for index, view in enumerate(self.views):
            if index not in self.seen:
                view.zero_()
        all_reduce_flat(self.total(), group)

    def total(self) -> Tensor:
        """The flat sum of a step that has begun, zero between parameters."""
        if self.sum_P is None:
            raise RuntimeError("no step has begun")
        return self.sum_P

    def norm(self) -> float:
        """Euclidean norm over all parameters, squares summed in float64 over short pieces."""
        return math.sqrt(sum(square_sums([self.total()])))

    def read(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """float32 gradient of a range of the flat layout: a view of the sum, or written to `scratch`."""
        part = self.total()[start:stop]
        return part if part.dtype == torch.float32 else scratch[: stop - start].copy_(part)

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if parameter.grad is None:
                return
            if index in self.seen:
                self.views[index].add_(parameter.grad)
            else:
                self.views[index].copy_(parameter.grad)
                self.seen.add(index)
            parameter.grad = None

        return take
