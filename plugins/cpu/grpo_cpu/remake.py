"""Results that are not kept for the backward pass, because their maker can make them again at little cost.

A norm or a SwiGLU keeps its own inputs anyway, so the linear layer behind it need not keep their result: it
asks the node of autograd's graph that made it. The first few narrow ones are kept all the same (`ROOM`,
`NARROW`). Nodes come in the order of the graph: that of the linear layer, which asks, always before the one
asked, which frees what it kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ROOM = 24 << 20
"""Bytes of results that are kept at a time: a small model's step feels the work and not the memory."""
NARROW = 512
"""Columns of a result worth keeping. To make it again is work of one pass over it; the products around it do
as many times that as their weights are wide."""
_kept_bytes = 0


class Kept:
    """The share of `ROOM` that a result takes, until the node that holds this is gone."""

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        global _kept_bytes
        self.nbytes = nbytes
        _kept_bytes += nbytes

    def __del__(self) -> None:
        global _kept_bytes
        _kept_bytes -= self.nbytes


@dataclass(frozen=True, slots=True)
class Maker:
    """The node of a first result, and what makes that result from what the node has kept."""

    node: Any
    make: Callable[[Any], Tensor]

    def again(self) -> Tensor:
        """The result, equal to the bit."""
        return self.make(self.node)


def maker_of(x: Tensor) -> Maker | Kept | None:
    """The maker of a tensor; `Kept` or None where the tensor must be kept."""
    make = getattr(x.grad_fn, "make_again", None)
    if make is None or x.output_nr != 0:
        return None
    if x.shape[-1] <= NARROW and _kept_bytes + x.nbytes <= ROOM:
        return Kept(x.nbytes)
    return Maker(x.grad_fn, make)


def kept(ctx: Any) -> tuple[Tensor, ...]:
    """What a node has kept. Activation checkpointing lets it be read once only, so it is noted."""
    if getattr(ctx, "noted", None) is None:
        ctx.noted = ctx.saved_tensors
    noted: tuple[Tensor, ...] = ctx.noted
    return noted


def forget(ctx: Any) -> None:
    """Drop the note at the end of the node's own backward pass: one of the tensors refers to the node."""
    ctx.noted = None
