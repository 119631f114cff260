"""Memory in plain torch: held storages that sleep in host memory, on disk or nowhere."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, UntypedStorage

from ..memory import MemoryStats

Keep = Literal["host", "disk", "none"]


@dataclass(slots=True)
class Held:
    """One storage under a tag. Tensors that share it are one entry."""

    storage: UntypedStorage
    nbytes: int
    content: Tensor | None = None

    def bytes_view(self) -> Tensor:
        """The storage as uint8 [nbytes]."""
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)


class HostMemory:
    """Reference of `memory.allocator`.

    `hold` keeps the storages alive. `allocated` is what is held and awake; `reserved` the resident size of
    the process; `peak` its highest, since the last reset as far as `stats` and `sleep` saw it.
    """

    def __init__(self) -> None:
        self.held: dict[str, list[Held]] = {}
        self.asleep: dict[str, Keep] = {}
        self.seen_peak: int | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def stats(self) -> MemoryStats:
        """See `Memory.stats`."""
        by_tag = {
            tag: sum(held.nbytes for held in rows) if tag not in self.asleep else 0
            for tag, rows in self.held.items()
        }
        return MemoryStats(
            allocated=sum(by_tag.values()),
            reserved=resident_bytes(),
            peak=self.peak(),
            by_tag=by_tag,
            asleep=dict(self.asleep),
        )

    def peak(self) -> int:
        """Highest resident bytes."""
        if self.seen_peak is None:
            return max(process_peak_bytes(), resident_bytes())
        self.seen_peak = max(self.seen_peak, resident_bytes())
        return self.seen_peak

    def reset_peak(self) -> None:
        """Start again from the present size; the system's own high-water mark cannot be lowered here."""
        self.seen_peak = resident_bytes()

    @contextlib.contextmanager
    def pool(self, tag: str) -> Iterator[None]:
        """Torch cannot tell which host allocations happen inside, so only `hold` counts towards a tag."""
        self.held.setdefault(tag, [])
        yield

    def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """See `Memory.hold`. Raises ValueError for a tag that sleeps or a storage held under another tag."""
        if tag in self.asleep:
            raise ValueError(f"tag {tag!r} sleeps: wake it before it takes more tensors")
        owners = {row.storage.data_ptr(): name for name, rows in self.held.items() for row in rows}
        rows = self.held.setdefault(tag, [])
        for tensor in tensors:
            storage = tensor.untyped_storage()
            owner = owners.setdefault(storage.data_ptr(), tag) if storage.nbytes() else tag
            if owner != tag:
                raise ValueError(f"a tensor for tag {tag!r} shares its storage with tag {owner!r}")
            if storage.nbytes() and all(row.storage.data_ptr() != storage.data_ptr() for row in rows):
                rows.append(Held(storage=storage, nbytes=storage.nbytes()))

    def sleep(self, *tags: str, keep: Keep) -> None:
        """See `Memory.sleep`. A tag that sleeps stays as it is; an unknown one raises ValueError."""
        if keep not in ("host", "disk", "none"):
            raise ValueError(f"keep must be 'host', 'disk' or 'none', not {keep!r}")
        self.peak()
        for tag in tags:
            rows = self._rows(tag)
            if tag in self.asleep:
                continue
            if keep == "disk":
                save_file({str(i): row.bytes_view().cpu() for i, row in enumerate(rows)}, self._file(tag))
            for row in rows:
                row.content = row.bytes_view().to("cpu", copy=True) if keep == "host" else None
                row.storage.resize_(0)
            self.asleep[tag] = keep

    def wake(self, *tags: str) -> None:
        """See `Memory.wake`. A tag that is awake stays as it is; an unknown one raises ValueError."""
        for tag in tags:
            rows = self._rows(tag)
            keep = self.asleep.pop(tag, None)
            if keep is None:
                continue
            saved = load_file(self._file(tag)) if keep == "disk" else {}
            for index, row in enumerate(rows):
                row.storage.resize_(row.nbytes)
                content = saved.get(str(index), row.content)
                row.bytes_view().zero_() if content is None else row.bytes_view().copy_(content)
                row.content = None
            if keep == "disk":
                self._file(tag).unlink()

    def empty_cache(self) -> None:
        """Nothing to give back: the C library keeps its own account."""

    def _rows(self, tag: str) -> list[Held]:
        if tag not in self.held:
            raise ValueError(f"no tensors are held under tag {tag!r}; known: {sorted(self.held)}")
        return self.held[tag]

    def _file(self, tag: str) -> Path:
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="grpo-sleep-")
        return Path(self.folder.name) / f"{hashlib.sha256(tag.encode()).hexdigest()[:24]}.safetensors"


def resident_bytes() -> int:
    """Resident size of this process; its peak where the system does not tell the present size."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return process_peak_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def process_peak_bytes() -> int:
    """High-water mark of the resident size, as getrusage tells it (bytes on macOS, KiB elsewhere)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
