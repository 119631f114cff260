"""What tables of token caches share: slots, their descent, and the free units of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(slots=True)
class Slot:
    """The room of one sequence."""

    length: int
    """Tokens, its prefix included."""
    own: int
    """Tokens of its own room."""
    units: list[int]
    """Rows or pages of a pool in the order of its tokens."""
    parent: int | None
    shared: int = 0
    """How many of the first units are an ancestor's."""
    children: int = 0
    freed: bool = False


SlotT = TypeVar("SlotT", bound=Slot)


class SlotTree(Generic[SlotT]):
    """Which slots are alive, who was forked from whom, and what is free.

    A slot that was freed while it has children keeps its units and its number until the last child goes.
    """

    def __init__(self, max_slots: int, max_tokens: int, units: int) -> None:
        self.max_slots, self.max_tokens = max_slots, max_tokens
        self._units = units
        self._slots: dict[int, SlotT] = {}
        self.reset()

    @property
    def alive(self) -> int:
        """Slots in use, freed parents of living children included."""
        return len(self._slots)

    def reset(self) -> None:
        """Free every slot."""
        self._slots.clear()
        self._free_slots = list(range(self.max_slots - 1, -1, -1))
        self._free_units = list(range(self._units - 1, -1, -1))
        self._free_tokens = self.max_tokens

    def free(self, slot: int) -> None:
        """Give a slot back. Raises ValueError when it is not alive."""
        self._alive(slot).freed = True
        at: int | None = slot
        while at is not None and self._slots[at].freed and self._slots[at].children == 0:
            gone = self._remove(at)
            self._free_units.extend(reversed(gone.units[gone.shared :]))
            self._free_slots.append(at)
            self._free_tokens += gone.own
            at = gone.parent
            if at is not None:
                self._slots[at].children -= 1

    def _remove(self, number: int) -> SlotT:
        """Take a slot out that nobody needs any more, a parent when its last child goes."""
        return self._slots.pop(number)

    def _alive(self, slot: int) -> SlotT:
        entry = self._slots.get(slot)
        if entry is None or entry.freed:
            raise ValueError(f"slot {slot} is not alive")
        return entry

    def _source(self, length: int, *, parent: int | None, prefix: int) -> SlotT | None:
        """The parent of a slot that is asked for.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        if length < 0 or prefix < 0:
            raise ValueError(f"a slot of {length} tokens after a prefix of {prefix} makes no sense")
        source = None if parent is None else self._alive(parent)
        if source is not None and prefix > source.length:
            raise ValueError(f"slot {parent} has {source.length} tokens, fewer than the prefix of {prefix}")
        return source

    def _is_full(self, length: int) -> bool:
        return not self._free_slots or length > self._free_tokens

    def _take(self, count: int) -> list[int]:
        return [self._free_units.pop() for _ in range(count)]

    def _add(self, entry: SlotT) -> int:
        """The number that a slot gets."""
        slot = self._free_slots.pop()
        self._free_tokens -= entry.own
        if entry.parent is not None:
            self._slots[entry.parent].children += 1
        self._slots[slot] = entry
        return slot
