"""Bookkeeping of a token cache: slots, shared prefixes, free rows. No keys or values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Slot:
    length: int
    own: list[int]
    parent: int | None
    children: int = 0
    freed: bool = False


class TokenTable:
    """Which pool row holds token `position` of sequence `slot`.

    A slot that was freed while it has children keeps its rows and its number until the last child goes.
    """

    def __init__(self, max_slots: int, max_tokens: int, device: torch.device) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.table_SL = torch.full((max_slots, 0), -1, dtype=torch.int64, device=device)
        self._slots: dict[int, _Slot] = {}
        self._free_slots: list[int] = []
        self._free_rows: list[int] = []
        self.reset()

    @property
    def alive(self) -> int:
        """Slots in use, freed parents of living children included."""
        return len(self._slots)

    def reset(self) -> None:
        """Free every slot."""
        self._slots.clear()
        self._free_slots = list(range(self.max_slots - 1, -1, -1))
        self._free_rows = list(range(self.max_tokens - 1, -1, -1))
        self.table_SL.fill_(-1)

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with `length` rows of its own after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        if length < 0 or prefix < 0:
            raise ValueError(f"a slot of {length} tokens after a prefix of {prefix} makes no sense")
        if parent is not None and prefix > self._alive(parent).length:
            raise ValueError(f"slot {parent} has fewer tokens than the prefix of {prefix}")
        if not self._free_slots or length > len(self._free_rows):
            return None
        slot = self._free_slots.pop()
        own = [self._free_rows.pop() for _ in range(length)]
        self._widen(prefix + length)
        self.table_SL[slot] = -1
        if parent is not None:
            self.table_SL[slot, :prefix] = self.table_SL[parent, :prefix]
            self._slots[parent].children += 1
        self.table_SL[slot, prefix : prefix + length] = torch.tensor(own, dtype=torch.int64)
        self._slots[slot] = _Slot(length=prefix + length, own=own, parent=parent)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Raises ValueError when it is not alive."""
        self._alive(slot).freed = True
        at: int | None = slot
        while at is not None and self._slots[at].freed and self._slots[at].children == 0:
            gone = self._slots.pop(at)
            self._free_rows.extend(reversed(gone.own))
            self._free_slots.append(at)
            at = gone.parent
            if at is not None:
                self._slots[at].children -= 1

    def rows(self, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """Pool rows int64 [T]. Raises IndexError for a position outside of its slot."""
        width = self.table_SL.shape[1]
        outside_T = (positions_T < 0) | (positions_T >= width)
        if not bool(outside_T.any()):
            rows_T = self.table_SL[slots_T, positions_T]
            outside_T = rows_T < 0
        if bool(outside_T.any()):
            at = int(outside_T.nonzero()[0])
            raise IndexError(f"slot {int(slots_T[at])} has no room at position {int(positions_T[at])}")
        return rows_T

    def _alive(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        if entry is None or entry.freed:
            raise ValueError(f"slot {slot} is not alive")
        return entry

    def _widen(self, width: int) -> None:
        have = self.table_SL.shape[1]
        if width > have:
            more = self.table_SL.new_full((self.max_slots, max(width, 2 * have) - have), -1)
            self.table_SL = torch.cat([self.table_SL, more], dim=1)
