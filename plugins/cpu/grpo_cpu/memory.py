"""Memory of the host: what `HostMemory` does, with a peak that can be reset and free memory given back.

"host" means the level below the device. Below the host is the disk, so on this device `keep="host"` writes
to disk too, and `stats().asleep` says so: a copy in memory would free nothing.
"""

from __future__ import annotations

from pathlib import Path

from grpo_core.ops.reference.memory import HostMemory, Keep

from . import malloc

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Linux 4.0: lowers VmHWM to the present resident size."""
LITTLE = 512 << 20
"""Free heap that is kept: paging it in again takes up to 0.8 s per GiB (3 us a page on a virtual machine), a
third of a small model's step."""


class CpuMemory(HostMemory):
    """See `grpo_core.ops.memory.Memory`. The first one made tunes the C library, see `malloc.tune`."""

    def __init__(self) -> None:
        super().__init__()
        self.tuning = malloc.tune()

    def sleep(self, *tags: str, keep: Keep) -> None:
        """See `Memory.sleep`; "host" is "disk" here."""
        super().sleep(*tags, keep="disk" if keep == "host" else keep)
        malloc.release()
        if keep != "none":
            malloc.trim()

    def peak(self) -> int:
        """Highest resident bytes since the last reset, as the kernel tells it."""
        if self.seen_peak is None:
            return _high_water() or super().peak()
        return super().peak()

    def reset_peak(self) -> None:
        """Lower the kernel's high-water mark; where that is not allowed, follow the size from here on."""
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            super().reset_peak()

    def empty_cache(self) -> None:
        """Give free heap memory back to the system, where there is much of it (`LITTLE`)."""
        malloc.release()
        free = malloc.free_bytes()
        if free is None or free >= LITTLE:
            malloc.trim()


def _high_water() -> int:
    """VmHWM in bytes, 0 where the kernel does not tell."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
