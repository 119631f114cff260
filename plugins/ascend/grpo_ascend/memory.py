"""Memory of an NPU: torch_npu's caching allocator, with tags that sleep on the host, on disk or nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch_npu
from torch import Tensor

from grpo_core.ops.memory import MemoryStats
from grpo_core.ops.reference.memory import HostMemory

EXPANDABLE = "expandable_segments:True"


class NpuMemory:
    """See `grpo_core.ops.memory.Memory`, for the selected NPU.

    Segments are made expandable where nothing has been allocated yet: steps of uneven length fragment the
    memory otherwise. A tag that sleeps gives its storages up and the allocator's cache back, so that another
    process of the same NPU gets the room.
    """

    def __init__(self) -> None:
        self.tags = HostMemory()
        if torch_npu.npu.memory_reserved() == 0:
            torch_npu.npu.memory._set_allocator_settings(EXPANDABLE)

    def stats(self) -> MemoryStats:
        """See `Memory.stats`; all of the NPU's tensors of this process count, held or not."""
        tagged = self.tags.stats()
        return MemoryStats(
            allocated=torch_npu.npu.memory_allocated(),
            reserved=torch_npu.npu.memory_reserved(),
            peak=torch_npu.npu.max_memory_allocated(),
            by_tag=tagged.by_tag,
            asleep=tagged.asleep,
        )

    def reset_peak(self) -> None:
        """See `Memory.reset_peak`."""
        torch_npu.npu.reset_peak_memory_stats()

    def pool(self, tag: str) -> AbstractContextManager[None]:
        """See `Memory.pool`; only `hold` counts towards a tag."""
        return self.tags.pool(tag)

    def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """See `Memory.hold`. Raises ValueError for a tag that sleeps or a storage held under another tag."""
        self.tags.hold(tag, tensors)

    def sleep(self, *tags: str, keep: Literal["host", "disk", "none"]) -> None:
        """See `Memory.sleep`. An unknown tag raises ValueError."""
        torch_npu.npu.synchronize()
        self.tags.sleep(*tags, keep=keep)
        torch_npu.npu.empty_cache()

    def wake(self, *tags: str) -> None:
        """See `Memory.wake`. An unknown tag raises ValueError."""
        self.tags.wake(*tags)

    def empty_cache(self) -> None:
        """See `Memory.empty_cache`."""
        torch_npu.npu.empty_cache()
