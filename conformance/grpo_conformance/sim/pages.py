"""Which page of a pool holds which tokens of which sequence. No keys or values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .offers import PAGE


@dataclass(slots=True)
class _Slot:
    length: int
    tokens: int
    """Of its own."""
    pages: list[int]
    """All of its pages in order; the first `shared` are its parent's."""
    shared: int
    parent: int | None
    children: int = 0
    freed: bool = False


class PageTable:
    """A table [slots, pages] on the device. A fork shares the full pages of its prefix and begins its own in
    the middle of one, whose first tokens its cache copies.

    A slot that was freed while it has children keeps its pages and its number until the last child goes.
    """

    def __init__(self, max_slots: int, max_tokens: int, device: torch.device) -> None:
        self.max_slots, self.max_tokens = max_slots, max_tokens
        # A slot wastes less than a page at its end and copies less than one at its beginning.
        self.num_pages = -(-max_tokens // PAGE) + 2 * max_slots
        self.pages_SP = torch.full((max_slots, self.num_pages), -1, dtype=torch.int64, device=device)
        self.length_S = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._slots: dict[int, _Slot] = {}
        self.reset()

    @property
    def alive(self) -> int:
        """Slots in use, freed parents of living children included."""
        return len(self._slots)

    def reset(self) -> None:
        """Free every slot."""
        self._slots.clear()
        self._free_slots = list(range(self.max_slots - 1, -1, -1))
        self._free_pages = list(range(self.num_pages - 1, -1, -1))
        self._free_tokens = self.max_tokens
        self.pages_SP.fill_(-1)
        self.length_S.zero_()

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with room for `length` tokens after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        if length < 0 or prefix < 0:
            raise ValueError(f"a slot of {length} tokens after a prefix of {prefix} makes no sense")
        if parent is not None and prefix > self._alive(parent).length:
            raise ValueError(f"slot {parent} has fewer tokens than the prefix of {prefix}")
        if not self._free_slots or length > self._free_tokens:
            return None
        shared = prefix // PAGE
        pages = [] if parent is None else self._slots[parent].pages[:shared]
        pages = pages + [self._free_pages.pop() for _ in range(-(-(prefix + length) // PAGE) - shared)]
        slot = self._free_slots.pop()
        self._free_tokens -= length
        if parent is not None:
            self._slots[parent].children += 1
        self._slots[slot] = _Slot(
            length=prefix + length, tokens=length, pages=pages, shared=shared, parent=parent
        )
        self.pages_SP[slot] = -1
        self.pages_SP[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int64).to(self.pages_SP.device)
        self.length_S[slot] = prefix + length
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Raises ValueError when it is not alive."""
        self._alive(slot).freed = True
        at: int | None = slot
        while at is not None and self._slots[at].freed and self._slots[at].children == 0:
            gone = self._slots.pop(at)
            self._free_pages.extend(reversed(gone.pages[gone.shared :]))
            self._free_slots.append(at)
            self._free_tokens += gone.tokens
            at = gone.parent
            if at is not None:
                self._slots[at].children -= 1

    def page(self, slot: int, number: int) -> int:
        """The pool's page that is number `number` of a slot."""
        return self._slots[slot].pages[number]

    def rows(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Rows int64 [T] of [pages * PAGE]. Raises IndexError for a position outside of its slot."""
        outside_T = (positions_T < 0) | (positions_T >= self.length_S[slots_T])
        if bool(outside_T.any()):
            at = int(outside_T.nonzero()[0])
            raise IndexError(f"slot {int(slots_T[at])} has no room at position {int(positions_T[at])}")
        return self.pages_SP[slots_T, positions_T // PAGE] * PAGE + positions_T % PAGE

    def _alive(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        if entry is None or entry.freed:
            raise ValueError(f"slot {slot} is not alive")
        return entry
