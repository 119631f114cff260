"""Caches in pages: which page of a pool holds which tokens, and how a fork begins in the middle of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .slot_tree import Slot, SlotTree
from .slots import Pooled, SlotCache


def recording(device_type: str) -> Callable[[], bool]:
    """A function that says whether the device records a graph just now."""
    module: Any = torch.get_device_module(device_type)
    found: Callable[[], bool] = getattr(module, "is_current_stream_capturing", lambda: False)
    return found


class PageTable(SlotTree[Slot]):
    """A table [slots, pages] on the device. A fork shares the full pages of its prefix and begins its own in
    the middle of one, whose first tokens its cache copies.
    """

    def __init__(self, max_slots: int, max_tokens: int, device: torch.device, page: int) -> None:
        self.page_size = page
        # A slot wastes less than a page at its end and copies less than one at its beginning.
        self.num_pages = -(-max_tokens // page) + 2 * max_slots
        self.pages_SP = torch.full((max_slots, self.num_pages), -1, dtype=torch.int64, device=device)
        self.length_S = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._recording = recording(device.type)
        super().__init__(max_slots, max_tokens, units=self.num_pages)

    def reset(self) -> None:
        """Free every slot."""
        super().reset()
        self.pages_SP.fill_(-1)
        self.length_S.zero_()

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with room for `length` tokens after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        source = self._source(length, parent=parent, prefix=prefix)
        if self._is_full(length):
            return None
        shared = prefix // self.page_size
        pages = [] if source is None else source.units[:shared]
        pages = pages + self._take(-(-(prefix + length) // self.page_size) - shared)
        slot = self._add(Slot(length=prefix + length, own=length, units=pages, shared=shared, parent=parent))
        self.pages_SP[slot] = -1
        self.pages_SP[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64).to(self.pages_SP.device)
        self.length_S[slot] = prefix + length
        return slot

    def page(self, slot: int, number: int) -> int:
        """The pool's page that is number `number` of a slot."""
        return self._slots[slot].units[number]

    def begun(self, slot: int, child: int, prefix: int) -> tuple[int, int, int] | None:
        """The page of `slot` that a prefix ends in the middle of, the child's own in its place, and how many
        tokens to copy from one to the other; None where the prefix fills its pages."""
        number, tokens = divmod(prefix, self.page_size)
        return (self.page(slot, number), self.page(child, number), tokens) if tokens else None

    def rows(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Rows int64 [T] of [pages * page size]. Raises IndexError for a position outside of its slot,
        but not while the device records a graph, when nothing can be asked."""
        size = self.page_size
        outside_T = (positions_T < 0) | (positions_T >= self.length_S[slots_T])
        if not self._recording() and bool(outside_T.any()):
            at = int(outside_T.nonzero()[0])
            raise IndexError(f"slot {int(slots_T[at])} has no room at position {int(positions_T[at])}")
        return self.pages_SP[slots_T, positions_T // size] * size + positions_T % size


class PageLayer(Pooled, Protocol):
    """A layer whose storage is in pages."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another."""
        ...


TableT = TypeVar("TableT", bound=PageTable)
LayerT = TypeVar("LayerT", bound=PageLayer)


class PageCache(SlotCache[TableT, LayerT]):
    """A cache in pages: a prefix's full pages are shared, its last tokens are copied."""

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        """See `KVCache.fork`. Raises ValueError for a slot that is not alive or holds less than `prefix`."""
        child = super().fork(slot, prefix=prefix, length=length)
        begun = None if child is None else self.table.begun(slot, child, prefix)
        if begun is not None:
            for layer in self.layers:
                layer.copy(*begun)
        return child
