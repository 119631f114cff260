"""The life cycle that all token caches share: slots come and go in a table, pools hold the layers' tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..attention import CacheSpec


class Table(Protocol):
    """Which slots are alive and where their tokens lie."""

    @property
    def alive(self) -> int: ...

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None: ...

    def free(self, slot: int) -> None: ...

    def reset(self) -> None: ...


class Pooled(Protocol):
    """A layer whose storage can be taken away and given back."""

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools from now on."""
        ...


TableT = TypeVar("TableT", bound=Table)
LayerT = TypeVar("LayerT", bound=Pooled)


class SlotCache(Generic[TableT, LayerT]):
    """`KVCache` and `LatentCache` but for the layout: a table of slots and some pools for each layer.

    `fill` makes a pool of a shape: `torch.zeros`, or `torch.empty` where no unwritten token is ever read.
    """

    def __init__(
        self,
        spec: CacheSpec,
        table: TableT,
        layers: Sequence[LayerT],
        shapes: Sequence[Sequence[int]],
        fill: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        self.spec = spec
        self.table = table
        self.layers = layers
        self._shapes = shapes
        self._fill = fill
        self._pools: list[list[Tensor]] = []
        self.restore()

    def allocate(self, length: int) -> int | None:
        """See `KVCache.allocate`."""
        return self.table.open(length, parent=None, prefix=0)

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        """See `KVCache.fork`. Raises ValueError for a slot that is not alive or holds less than `prefix`."""
        return self.table.open(length, parent=slot, prefix=prefix)

    def free(self, slot: int) -> None:
        """See `KVCache.free`. Raises ValueError for a slot that is not alive."""
        self.table.free(slot)

    def reset(self) -> None:
        """See `KVCache.reset`."""
        self.table.reset()

    def nbytes(self) -> int:
        """Bytes of storage reserved."""
        return sum(pool.nbytes for pools in self._pools for pool in pools)

    def release(self) -> None:
        """See `KVCache.release`. Raises RuntimeError while a slot is alive."""
        if self.table.alive:
            raise RuntimeError(f"{self.table.alive} slots are alive: free them before releasing the cache")
        self._pools = []
        for layer in self.layers:
            layer.hold([torch.empty(0) for _ in self._shapes])

    def restore(self) -> None:
        """See `KVCache.restore`."""
        like = {"dtype": self.spec.dtype, "device": self.spec.device}
        self._pools = [[self._fill(shape, **like) for shape in self._shapes] for _ in self.layers]
        for layer, pools in zip(self.layers, self._pools, strict=True):
            layer.hold(pools)
