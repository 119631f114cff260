"""Bookkeeping of the paged cache: slots, shared prefixes, free blocks. No keys or values."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.ops.reference.slot_tree import Slot, SlotTree

BLOCK = 32
"""Tokens of a block."""
HEADER = 3
"""Columns of a row before its starts: blocks used, blocks shared, parent or itself."""


@dataclass(slots=True, kw_only=True)
class _Slot(Slot):
    starts: list[int]
    """Position of each block's first token, then the end of the room."""


class SlotTable(SlotTree[_Slot]):
    """Which blocks hold the tokens of a slot, as lists for bookkeeping and as an int32 tensor for kernels."""

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        self.num_blocks = -(-max_tokens // BLOCK) + max_slots
        self.width = 0
        self._rows = torch.zeros(max_slots, HEADER + 1, dtype=torch.int32)
        self._cells = self._rows.numpy()
        """The same memory: lists are written ten times as fast as through a tensor."""
        self._stale: set[int] = set()
        """Slots whose rows are to be written, ..."""
        self._gone: set[int] = set()
        """... and those whose rows are to be emptied."""
        super().__init__(max_slots, max_tokens, units=self.num_blocks)

    @property
    def rows(self) -> Tensor:
        """int32 [max_slots, 2 * width + 4]; written here, because slots come and go by the hundred."""
        if self._gone:
            # No blocks used and none shared: nothing else is read then.
            self._cells[list(self._gone), :2] = 0
            self._gone.clear()
        if self._stale:
            self._write_rows()
        return self._rows

    def reset(self) -> None:
        """Free every slot."""
        super().reset()
        self._stale.clear()
        self._gone.clear()
        self._cells.fill(0)

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with room for `length` tokens after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        source = self._source(length, parent=parent, prefix=prefix)
        if self._is_full(length):
            return None
        blocks, starts = [], [0]
        if source is not None:
            shared = bisect_left(source.starts, prefix, 0, len(source.starts) - 1)
            blocks, starts = source.units[:shared], [*source.starts[:shared], prefix]
        shared, end = len(blocks), prefix + length
        if length:
            blocks += self._take(-(-length // BLOCK))
            starts += [*range(prefix + BLOCK, end, BLOCK), end]
        number = self._add(_Slot(end, length, blocks, parent, shared, starts=starts))
        self._stale.add(number)
        return number

    def _remove(self, number: int) -> _Slot:
        self._stale.discard(number)
        self._gone.add(number)
        return super()._remove(number)

    def _write_rows(self) -> None:
        numbers = list(self._stale)
        self._stale.clear()
        longest = max(len(self._slots[number].units) for number in numbers)
        if longest > self.width:
            self.width = max(longest, 2 * self.width)
            self._rows = torch.zeros(self.max_slots, 2 * self.width + HEADER + 1, dtype=torch.int32)
            self._cells = self._rows.numpy()
            numbers = list(self._slots)
        self._cells[numbers] = [self._row(number) for number in numbers]

    def _row(self, number: int) -> list[int]:
        slot = self._slots[number]
        pad = [0] * (self.width - len(slot.units))
        owner = number if slot.parent is None else slot.parent
        return [len(slot.units), slot.shared, owner, *slot.starts, *pad, *slot.units, *pad]
