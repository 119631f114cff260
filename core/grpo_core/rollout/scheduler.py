"""Continuous batching: which prompts are prefilled and which samples start, in order of arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    from numpy.typing import NDArray

NO_SLOT = -1


class Slots(Protocol):
    """The part of `KVCache` that the scheduler uses."""

    def allocate(self, length: int) -> int | None: ...
    def fork(self, slot: int, *, prefix: int, length: int) -> int | None: ...
    def free(self, slot: int) -> None: ...


class Start(NamedTuple):
    """One sample that starts to decode."""

    group: int
    sample: int
    slot: int


class Scheduler:
    """Groups of samples over a cache and a number of lanes; first come, first served.

    A group's prompt gets a slot of its own, is prefilled once and forked to its samples; when they do not
    all fit, the prompt's slot is kept until the last has started. Each running sample holds one lane.
    Groups [0, head) have started all samples, [head, ready) are prefilled and wait for room.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        prompt_tokens: NDArray[np.int64],
        group_sizes: NDArray[np.int64],
        new_tokens: NDArray[np.int64],
        max_sequences: int,
        max_tokens: int,
    ) -> None:
        self.slots = slots
        # Lists: single elements of arrays are slow to read, and each sample reads several.
        self.prompt_tokens: list[int] = prompt_tokens.tolist()
        self.group_sizes: list[int] = group_sizes.tolist()
        self.new_tokens: list[int] = new_tokens.tolist()
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        count = len(prompt_tokens)
        self.prompt_slots = [NO_SLOT] * count
        self.started = [0] * count
        self.alive = [0] * count
        self.head = 0
        self.ready = 0
        self.running = 0
        self.used_tokens = 0
        """Tokens that the cache holds for us, without the rounding of its pages."""

    @property
    def done(self) -> bool:
        """Every sample has started and finished."""
        return self.running == 0 and self.head == len(self.prompt_tokens)

    def to_prefill(self) -> list[tuple[int, int]]:
        """(group, slot) of the prompts to prefill now; empty when it is better to decode first.

        A pass over the model costs nearly the same for one short prompt as for several, so while samples
        run, new prompts wait until an eighth of the lanes is free.
        """
        left = {
            group: self.group_sizes[group] - self.started[group] for group in range(self.head, self.ready)
        }
        waiting = sum(left.values())
        lanes = self.max_sequences - self.running - waiting
        if lanes < (max(1, self.max_sequences // 8) if self.running else 1):
            return []
        reserved = sum(count * self.new_tokens[group] for group, count in left.items())
        room = self.max_tokens - self.used_tokens - reserved
        planned: list[tuple[int, int]] = []
        while self.ready < len(self.prompt_tokens) and lanes > 0:
            group = self.ready
            prompt, new = self.prompt_tokens[group], self.new_tokens[group]
            alone = not planned and self.running == 0 and self.head == self.ready
            if prompt + new > room and not alone:
                break
            single = self.group_sizes[group] == 1
            slot = self.slots.allocate(prompt + new if single else prompt)
            if slot is None:
                if alone:
                    raise too_small(prompt + new, self.max_tokens)
                break
            wanted = min(self.group_sizes[group], lanes)
            self.prompt_slots[group] = slot
            self.used_tokens += prompt
            room -= prompt + wanted * new
            lanes -= wanted
            self.ready += 1
            planned.append((group, slot))
        return planned

    def start(self) -> list[Start]:
        """Samples of prefilled groups that fit now, forked from their prompts."""
        starts: list[Start] = []
        while self.head < self.ready:
            blocked = self._start_group(self.head, starts)
            if blocked and self.running == 0:
                self._give_way()
                blocked = self._start_group(self.head, starts)
                if self.running == 0:
                    need = self.prompt_tokens[self.head] + self.new_tokens[self.head]
                    raise too_small(need, self.max_tokens)
            if blocked:
                break
            self.head += 1
        return starts

    def _start_group(self, group: int, starts: list[Start]) -> bool:
        """Start what fits of one group; True when samples are left over."""
        slot, new, prompt = self.prompt_slots[group], self.new_tokens[group], self.prompt_tokens[group]
        single = self.group_sizes[group] == 1
        while self.started[group] < self.group_sizes[group]:
            if self.running >= self.max_sequences:
                return True
            child = slot if single else self.slots.fork(slot, prefix=prompt, length=new)
            if child is None:
                return True
            starts.append(Start(group, self.started[group], child))
            self.started[group] += 1
            self.alive[group] += 1
            self.running += 1
            self.used_tokens += new
        if not single:
            self.slots.free(slot)
        self.prompt_slots[group] = NO_SLOT
        return False

    def _give_way(self) -> None:
        """Take back the slots of later prompts, which keep the first from starting; prefill them again."""
        for group in range(self.head + 1, self.ready):
            self.slots.free(self.prompt_slots[group])
            self.prompt_slots[group] = NO_SLOT
            self.used_tokens -= self.prompt_tokens[group]
        self.ready = self.head + 1

    def finish(self, groups: Iterable[int], slots: Iterable[int]) -> None:
        """Take back the slots of finished samples."""
        for group, slot in zip(groups, slots, strict=True):
            self.slots.free(slot)
            self.running -= 1
            self.alive[group] -= 1
            self.used_tokens -= self.new_tokens[group]
            if self.finished(group):
                self.used_tokens -= self.prompt_tokens[group]

    def finished(self, group: int) -> bool:
        """Every sample of the group has started and finished."""
        return self.alive[group] == 0 and self.started[group] == self.group_sizes[group]


def too_small(need: int, held: int) -> ConfigError:
    """The error for a sequence that an empty cache cannot take."""
    return ConfigError(
        f"the rollout cache cannot hold one sequence of {need} tokens",
        why=f"it was sized for {held} tokens (rollout.options.cache_tokens)",
        fix="raise rollout.options.cache_tokens, or lower rollout.max_tokens or data.max_prompt_tokens",
    )
