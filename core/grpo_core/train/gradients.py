"""Gradients of one optimizer step: summed in float32 over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .parallel import all_reduce_flat

if TYPE_CHECKING:
    from ..ops.collectives import Group
    from ..ops.memory import Memory
    from .parameters import FlatParameters

NORM_PIECE = 1 << 20
"""Elements that one sum of squares covers."""
NORM_ROW = 1 << 12
"""Squares added up in float32; rows are added in float64."""


def square_sums(tensors: Iterable[Tensor]) -> list[float]:
    """Sums of squares of contiguous tensors, one for each piece of `NORM_PIECE` elements; read in one go."""
    norms = [_norm(piece) for tensor in tensors for piece in torch.split(tensor.reshape(-1), NORM_PIECE)]
    return [norm * norm for norm in torch.stack(norms).tolist()]


def _norm(piece_P: Tensor) -> Tensor:
    # Not every device has float64, and a float64 copy of the whole would cost more than the sum.
    wide = torch.float64 if piece_P.device.type == "cpu" else torch.float32
    whole = piece_P.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(piece_P[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(piece_P[whole:], dtype=torch.float32)
    norm: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest[None]]).to(wide))
    return norm


class Gradients:
    """Takes each parameter's gradient into one flat buffer the moment it is complete.

    Layers that have a `main_grad` are lent their part of a float32 buffer and add to it themselves. Other
    gradients are taken from autograd, whose memory is freed at once, so that gradients neither pile up in
    the compute dtype nor lie between activations and keep their memory from being given back. The buffer is
    float32; as long as no step had more than one micro-batch on one rank there is nothing to add up, and it
    has the compute dtype. Between steps its memory is free for the rollout.
    """

    def __init__(self, flat: FlatParameters, module: nn.Module, memory: Memory) -> None:
        self.flat, self.memory = flat, memory
        self.sum_P: Tensor | None = None
        self.views: list[Tensor] = []
        places = {id(parameter): index for index, parameter in enumerate(flat.parameters)}
        self.adders: list[tuple[Any, int]] = [
            (layer, places[id(layer.weight)]) for layer in module.modules() if hasattr(layer, "main_grad")
        ]
        for index, parameter in enumerate(flat.parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]

    def begin(self, *, single: bool) -> None:
        """Start a step with a sum of zeros; `single` promises one micro-batch on one rank."""
        weights_P = self.flat.weights_P
        dtype = weights_P.dtype if single else torch.float32
        if self.sum_P is None or (self.sum_P.dtype != dtype and not single):
            self.release()
            self.sum_P = torch.empty(weights_P.shape, device=weights_P.device, dtype=dtype)
            self.memory.hold(self._tag(), [self.sum_P])
            views = self.flat.views(self.sum_P)
            self.views = [views[slot.name] for slot in self.flat.slots]
            self.sum_P.zero_()
        elif self.nbytes() == 0:
            self.memory.wake(self._tag())
        else:
            self.sum_P.zero_()
        self._lend(lent=self.sum_P.dtype == torch.float32)

    def release(self) -> None:
        """Free the buffer's memory until the next step."""
        self._lend(lent=False)
        if self.sum_P is not None:
            self.memory.sleep(self._tag(), keep="none")

    def nbytes(self) -> int:
        """Bytes held at the moment."""
        return 0 if self.sum_P is None else self.sum_P.untyped_storage().nbytes()

    def finish(self, group: Group) -> None:
        """Complete the sum over all ranks."""
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

    def _tag(self) -> str:
        """One for each dtype: a tag that sleeps takes no further tensors."""
        return f"gradients in {str(self.total().dtype).removeprefix('torch.')}"

    def _lend(self, *, lent: bool) -> None:
        for layer, index in self.adders:
            layer.main_grad = self.views[index] if lent else None

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.views[index].add_(parameter.grad)
                parameter.grad = None

        return take
