"""Bookkeeping of the paged cache: slots, shared prefixes, free blocks. No keys or values."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Tokens of a block."""
HEADER = 3
"""Columns of a row before its starts: blocks used, blocks shared, parent or itself."""


@dataclass(slots=True)
class _Slot:
    blocks: list[int]
    """In the order of its tokens; the first `shared` belong to ancestors."""
    starts: list[int]
    """Position of each block's first token, then the end of the room."""
    shared: int
    own: int
    """Tokens of its own room."""
    parent: int | None
    children: int = 0
    freed: bool = False


class SlotTable:
    """Which blocks hold the tokens of a slot, as lists for bookkeeping and as an int32 tensor for kernels.

    A slot that was freed while it has children keeps its blocks and number until the last child goes.
    """

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.num_blocks = -(-max_tokens // BLOCK) + max_slots
        self.width = 0
        self._rows = torch.zeros(max_slots, HEADER + 1, dtype=torch.int32)
        self._cells = self._rows.numpy()
        """The same memory: lists are written ten times as fast as through a tensor."""
        self._stale: set[int] = set()
        """Slots whose rows are to be written, ..."""
        self._gone: set[int] = set()
        """... and those whose rows are to be emptied."""
        self._slots: dict[int, _Slot] = {}
        self._free_slots: list[int] = []
        self._free_blocks: list[int] = []
        self._tokens = 0
        self.reset()

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

    @property
    def alive(self) -> int:
        """Slots in use, freed parents of living children included."""
        return len(self._slots)

    def reset(self) -> None:
        """Free every slot."""
        self._slots.clear()
        self._free_slots = list(range(self.max_slots - 1, -1, -1))
        self._free_blocks = list(range(self.num_blocks - 1, -1, -1))
        self._tokens = 0
        self._stale.clear()
        self._gone.clear()
        self._cells.fill(0)

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with room for `length` tokens after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        if length < 0 or prefix < 0:
            raise ValueError(f"a slot of {length} tokens after a prefix of {prefix} makes no sense")
        blocks, starts = [], [0]
        if parent is not None:
            source = self._alive(parent)
            if prefix > source.starts[-1]:
                raise ValueError(
                    f"slot {parent} holds {source.starts[-1]} tokens, fewer than prefix {prefix}"
                )
            shared = bisect_left(source.starts, prefix, 0, len(source.starts) - 1)
            blocks, starts = source.blocks[:shared], [*source.starts[:shared], prefix]
        if not self._free_slots or self._tokens + length > self.max_tokens:
            return None
        shared = len(blocks)
        for start in range(prefix, prefix + length, BLOCK):
            blocks.append(self._free_blocks.pop())
            starts.append(min(start + BLOCK, prefix + length))
        number = self._free_slots.pop()
        if parent is not None:
            self._slots[parent].children += 1
        self._slots[number] = _Slot(blocks, starts, shared, length, parent)
        self._tokens += length
        self._stale.add(number)
        return number

    def free(self, slot: int) -> None:
        """Give a slot back. Raises ValueError when it is not alive."""
        self._alive(slot).freed = True
        at: int | None = slot
        while at is not None and self._slots[at].freed and self._slots[at].children == 0:
            gone = self._slots.pop(at)
            self._free_blocks.extend(reversed(gone.blocks[gone.shared :]))
            self._free_slots.append(at)
            self._tokens -= gone.own
            self._stale.discard(at)
            self._gone.add(at)
            at = gone.parent
            if at is not None:
                self._slots[at].children -= 1

    def _alive(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        if entry is None or entry.freed:
            raise ValueError(f"slot {slot} is not alive")
        return entry

    def _write_rows(self) -> None:
        numbers = list(self._stale)
        self._stale.clear()
        longest = max(len(self._slots[number].blocks) for number in numbers)
        if longest > self.width:
            self.width = max(longest, 2 * self.width)
            self._rows = torch.zeros(self.max_slots, 2 * self.width + HEADER + 1, dtype=torch.int32)
            self._cells = self._rows.numpy()
            numbers = list(self._slots)
        self._cells[numbers] = [self._row(number) for number in numbers]

    def _row(self, number: int) -> list[int]:
        slot = self._slots[number]
        pad = [0] * (self.width - len(slot.blocks))
        owner = number if slot.parent is None else slot.parent
        return [len(slot.blocks), slot.shared, owner, *slot.starts, *pad, *slot.blocks, *pad]
