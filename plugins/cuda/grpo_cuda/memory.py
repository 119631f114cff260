"""Memory of a GPU: torch's caching allocator, with tags that sleep in pinned host memory, on disk or nowhere.

Segments are expandable where torch lets them: addresses are reserved once and memory is mapped behind them,
so that what sleeps gives whole pages back, and steps of uneven length do not fragment the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.memory import MemoryStats
from grpo_core.ops.reference.memory import Held, HostMemory, Keep

EXPANDABLE = "expandable_segments:True"
SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Environment variables by which a user sets torch's allocator up; then it stays as it is."""
PIECE = 1 << 28
"""Bytes of a piece of pinned memory: torch rounds each allocation of it up to a power of two."""


class PinnedMemory(HostMemory):
    """`HostMemory` whose copies on the host are pinned, made without waiting for each, and kept for the next
    sleep: pinning memory takes as long as copying it.

    A tag that finds no room when it wakes goes on sleeping with its content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, list[Tensor]] = {}
        """Pinned pieces by the identity of the `Held`, which lives as long as this object."""

    def sleep(self, *tags: str, keep: Keep) -> None:
        """See `Memory.sleep`. A tag that sleeps stays as it is; an unknown one raises ValueError."""
        if keep != "host":
            super().sleep(*tags, keep=keep)
            return
        for tag in tags:
            rows = self._rows(tag)
            if tag in self.asleep:
                continue
            for row in rows:
                view = row.bytes_view()
                for piece, part in zip(self._pieces(row), view.split(PIECE), strict=True):
                    piece.copy_(part, non_blocking=True)
            _finish(rows)
            for row in rows:
                row.storage.resize_(0)
            self.asleep[tag] = keep

    def wake(self, *tags: str) -> None:
        """See `Memory.wake`. A tag that is awake stays as it is; an unknown one raises ValueError.

        Raises torch.OutOfMemoryError where there is no room; the tag then sleeps on.
        """
        for tag in tags:
            rows = self._rows(tag)
            keep = self.asleep.get(tag)
            if keep is None:
                continue
            _make_room(rows)
            if keep != "host":
                super().wake(tag)
                continue
            for row in rows:
                for piece, part in zip(self._pieces(row), row.bytes_view().split(PIECE), strict=True):
                    part.copy_(piece, non_blocking=True)
            del self.asleep[tag]

    def pinned_bytes(self) -> int:
        """Bytes of host memory held for sleeping tags, asleep or not."""
        return sum(piece.nbytes for pieces in self.copies.values() for piece in pieces)

    def _pieces(self, row: Held) -> list[Tensor]:
        if id(row) not in self.copies:
            sizes = [min(PIECE, row.nbytes - start) for start in range(0, row.nbytes, PIECE)]
            pinned = row.storage.device.type == "cuda"
            self.copies[id(row)] = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        return self.copies[id(row)]


def _make_room(rows: list[Held]) -> None:
    """Storage for all rows, or for none."""
    try:
        for row in rows:
            row.storage.resize_(row.nbytes)
    except torch.OutOfMemoryError:
        for row in rows:
            row.storage.resize_(0)
        raise


def _finish(rows: list[Held]) -> None:
    """Wait for copies from the GPUs that hold these rows."""
    for device in {row.storage.device for row in rows}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _set_up(settings: str) -> None:
    """Settings of torch's allocator, under the name that they have had since torch 2.10, or before."""
    core: Any = torch._C
    name = "_accelerator_setAllocatorSettings"
    (getattr(core, name) if hasattr(core, name) else core._cuda_cudaCachingAllocator_set_allocator_settings)(
        settings
    )


class CudaMemory:
    """See `grpo_core.ops.memory.Memory`, for the selected GPU. What does not fit raises
    torch.OutOfMemoryError."""

    def __init__(self) -> None:
        self.tags = PinnedMemory()
        unset = not any(os.environ.get(name) for name in SETTINGS)
        if unset and torch.cuda.memory_reserved() == 0:
            _set_up(EXPANDABLE)

    def stats(self) -> MemoryStats:
        """See `Memory.stats`; all of the GPU's tensors of this process count, held or not."""
        tagged = self.tags.stats()
        return MemoryStats(
            allocated=torch.cuda.memory_allocated(),
            reserved=torch.cuda.memory_reserved(),
            peak=torch.cuda.max_memory_allocated(),
            by_tag=tagged.by_tag,
            asleep=tagged.asleep,
        )

    def reset_peak(self) -> None:
        """See `Memory.reset_peak`."""
        torch.cuda.reset_peak_memory_stats()

    def pool(self, tag: str) -> AbstractContextManager[None]:
        """See `Memory.pool`; only `hold` counts towards a tag."""
        return self.tags.pool(tag)

    def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """See `Memory.hold`. Raises ValueError for a tag that sleeps or a storage held under another tag."""
        self.tags.hold(tag, tensors)

    def sleep(self, *tags: str, keep: Keep) -> None:
        """See `Memory.sleep`. An unknown tag raises ValueError."""
        torch.cuda.synchronize()
        self.tags.sleep(*tags, keep=keep)
        torch.cuda.empty_cache()

    def wake(self, *tags: str) -> None:
        """See `Memory.wake`. An unknown tag raises ValueError."""
        self.tags.wake(*tags)

    def empty_cache(self) -> None:
        """See `Memory.empty_cache`."""
        torch.cuda.empty_cache()
