"""Bookkeeping of the paged cache: slots, shared prefixes, free blocks. No keys or values."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import torch

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
        self.rows = torch.zeros(max_slots, 2 * self.width + HEADER + 1, dtype=torch.int32)
        self._cells = self.rows.numpy()
        """The same memory: a short list is written ten times as fast as through a tensor."""
        self._slots: dict[int, _Slot] = {}
        self._free_slots: list[int] = []
        self._free_blocks: list[int] = []
        self._tokens = 0
        self.reset()

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
        self.rows.zero_()

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
        self._write_row(number)
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
            self._cells[at] = 0
            at = gone.parent
            if at is not None:
                self._slots[at].children -= 1

    def _alive(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        if entry is None or entry.freed:
            raise ValueError(f"slot {slot} is not alive")
        return entry

    def _write_row(self, number: int) -> None:
        slot = self._slots[number]
        if len(slot.blocks) > self.width:
            self._widen(max(len(slot.blocks), 2 * self.width))
        else:
            self._cells[number] = self._row(number)

    def _row(self, number: int) -> list[int]:
        slot = self._slots[number]
        pad = [0] * (self.width - len(slot.blocks))
        owner = number if slot.parent is None else slot.parent
        return [len(slot.blocks), slot.shared, owner, *slot.starts, *pad, *slot.blocks, *pad]

    def _widen(self, width: int) -> None:
        self.width = width
        self.rows = torch.zeros(self.max_slots, 2 * width + HEADER + 1, dtype=torch.int32)
        self._cells = self.rows.numpy()
        for number in self._slots:
            self._cells[number] = self._row(number)
