"""The scheduler alone: no slot leaks, every sample starts and finishes once, limits are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.errors import ConfigError
from grpo_core.rollout.scheduler import Scheduler


class PagedSlots:
    """A cache without contents that rounds to pages and checks every call."""

    def __init__(self, pages: int, page: int, max_slots: int) -> None:
        self.page, self.free_pages, self.max_slots = page, pages, max_slots
        self.slots: dict[int, tuple[int, int | None]] = {}
        self.freed: set[int] = set()
        self.next = 0

    def _open(self, length: int, parent: int | None) -> int | None:
        need = -(-length // self.page)
        if need > self.free_pages or len(self.slots) >= self.max_slots:
            return None
        self.free_pages -= need
        self.next += 1
        self.slots[self.next] = (need, parent)
        return self.next

    def allocate(self, length: int) -> int | None:
        return self._open(length, None)

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        assert slot in self.slots and slot not in self.freed
        return self._open(length, slot)

    def free(self, slot: int) -> None:
        assert slot in self.slots and slot not in self.freed
        self.freed.add(slot)
        for gone in sorted(self.freed, reverse=True):
            if not any(parent == gone for _, parent in self.slots.values()):
                self.free_pages += self.slots.pop(gone)[0]
                self.freed.discard(gone)


groups = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    groups=groups, lanes=st.integers(1, 6), page=st.integers(1, 4), pages=st.integers(1, 40), data=st.data()
)
def test_every_sample_runs_once_and_every_slot_comes_back(
    groups: list[tuple[int, int, int]], lanes: int, page: int, pages: int, data: st.DataObject
) -> None:
    needed = max(-(-p // page) + -(-n // page) if g > 1 else -(-(p + n) // page) for p, g, n in groups)
    slots = PagedSlots(pages, page, 2 * lanes + 1)
    prompt, size, new = (np.array(column, dtype=np.int64) for column in zip(*groups, strict=True))
    scheduler = Scheduler(
        slots, prompt_tokens=prompt, group_sizes=size, new_tokens=new, max_sequences=lanes,
        max_tokens=pages * page,
    )  # fmt: skip
    seen: set[tuple[int, int]] = set()
    order: list[int] = []
    prefilled: set[int] = set()
    running: list[tuple[int, int]] = []
    try:
        for _ in range(1000):
            if scheduler.done:
                break
            for group, slot in scheduler.to_prefill():
                assert slot in slots.slots
                prefilled.add(group)
            for start in scheduler.start():
                assert start.group in prefilled
                assert (start.group, start.sample) not in seen
                seen.add((start.group, start.sample))
                order.append(start.group)
                running.append((start.group, start.slot))
            assert len(running) == scheduler.running <= lanes
            assert running, "nothing runs and nothing is done: a deadlock"
            ending = data.draw(st.integers(1, len(running)))
            gone = [running.pop(data.draw(st.integers(0, len(running) - 1))) for _ in range(ending)]
            scheduler.finish([group for group, _ in gone], [slot for _, slot in gone])
    except ConfigError:
        assert needed > pages
        return
    assert scheduler.done
    assert len(seen) == size.sum()
    assert order == sorted(order)
    assert not slots.slots and slots.free_pages == pages
    assert scheduler.used_tokens == 0


def test_a_sequence_that_an_empty_cache_cannot_hold_is_an_error_not_a_deadlock() -> None:
    for size in (1, 3):
        scheduler = Scheduler(
            PagedSlots(2, 8, 9), prompt_tokens=np.array([8]), group_sizes=np.array([size]),
            new_tokens=np.array([9]), max_sequences=4, max_tokens=16,
        )  # fmt: skip
        with pytest.raises(ConfigError, match="cannot hold one sequence of 17 tokens"):
            scheduler.to_prefill()
            scheduler.start()


def test_prompts_that_page_rounding_left_without_room_for_a_sample_give_way() -> None:
    # By tokens all five groups of 1 + 2 fit into 16, but each prompt takes a whole page of the four.
    slots = PagedSlots(4, 4, 99)
    scheduler = Scheduler(
        slots, prompt_tokens=np.full(5, 1), group_sizes=np.full(5, 2), new_tokens=np.full(5, 1),
        max_sequences=16, max_tokens=16,
    )  # fmt: skip
    assert len(scheduler.to_prefill()) == 4
    starts = scheduler.start()
    assert starts and {start.group for start in starts} == {0}
    finished = 0
    while not scheduler.done:
        finished += len(starts)
        scheduler.finish([start.group for start in starts], [start.slot for start in starts])
        scheduler.to_prefill()
        starts = scheduler.start()
    assert finished == 10 and slots.free_pages == 4


def test_new_prompts_wait_for_an_eighth_of_the_lanes() -> None:
    scheduler = Scheduler(
        PagedSlots(1000, 1, 99), prompt_tokens=np.full(40, 2), group_sizes=np.full(40, 1),
        new_tokens=np.full(40, 3), max_sequences=16, max_tokens=1000,
    )  # fmt: skip
    assert len(scheduler.to_prefill()) == 16
    running = scheduler.start()
    scheduler.finish([running[0].group], [running[0].slot])
    assert scheduler.to_prefill() == []
    scheduler.finish([running[1].group], [running[1].slot])
    assert len(scheduler.to_prefill()) == 2
