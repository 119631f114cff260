"""Memory of the simulated device: its own account, tags that sleep on the host, on disk or nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal

from torch import Tensor

from grpo_core.ops.memory import MemoryStats
from grpo_core.ops.reference.memory import HostMemory

from .runtime import index_of, ops


class SimMemory:
    """See `grpo_core.ops.memory.Memory`, for the selected device.

    The tags are the reference's, which resizes storages of any device. There is no caching: what is reserved
    is what is allocated.
    """

    def __init__(self) -> None:
        self.tags = HostMemory()

    def stats(self) -> MemoryStats:
        """See `Memory.stats`; all of the device's tensors count, held or not."""
        allocated, peak, *_ = ops.account(index_of())
        tagged = self.tags.stats()
        return MemoryStats(
            allocated=allocated, reserved=allocated, peak=peak, by_tag=tagged.by_tag, asleep=tagged.asleep
        )

    def reset_peak(self) -> None:
        """See `Memory.reset_peak`."""
        ops.reset_peak(index_of())

    def pool(self, tag: str) -> AbstractContextManager[None]:
        """See `Memory.pool`; only `hold` counts towards a tag."""
        return self.tags.pool(tag)

    def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """See `Memory.hold`. Raises ValueError for a tag that sleeps or a storage held under another tag."""
        self.tags.hold(tag, tensors)

    def sleep(self, *tags: str, keep: Literal["host", "disk", "none"]) -> None:
        """See `Memory.sleep`. An unknown tag raises ValueError."""
        self.tags.sleep(*tags, keep=keep)

    def wake(self, *tags: str) -> None:
        """See `Memory.wake`. An unknown tag raises ValueError."""
        self.tags.wake(*tags)

    def empty_cache(self) -> None:
        """Nothing is cached."""
