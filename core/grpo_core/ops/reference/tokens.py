"""Bookkeeping of a token cache: which row of a pool holds which token. No keys or values."""

from __future__ import annotations

import torch
from torch import Tensor

from .slot_tree import Slot, SlotTree


class TokenTable(SlotTree[Slot]):
    """Which pool row holds token `position` of sequence `slot`."""

    def __init__(self, max_slots: int, max_tokens: int, device: torch.device) -> None:
        self.table_SL = torch.full((max_slots, 0), -1, dtype=torch.int64, device=device)
        super().__init__(max_slots, max_tokens, units=max_tokens)

    def reset(self) -> None:
        """Free every slot."""
        super().reset()
        self.table_SL.fill_(-1)

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with `length` rows of its own after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        self._source(length, parent=parent, prefix=prefix)
        if self._is_full(length):
            return None
        rows = self._take(length)
        slot = self._add(Slot(length=prefix + length, own=length, units=rows, parent=parent))
        self._widen(prefix + length)
        self.table_SL[slot] = -1
        if parent is not None:
            self.table_SL[slot, :prefix] = self.table_SL[parent, :prefix]
        self.table_SL[slot, prefix : prefix + length] = torch.tensor(rows, dtype=torch.int64)
        return slot

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

    def _widen(self, width: int) -> None:
        have = self.table_SL.shape[1]
        if width > have:
            more = self.table_SL.new_full((self.max_slots, max(width, 2 * have) - have), -1)
            self.table_SL = torch.cat([self.table_SL, more], dim=1)
