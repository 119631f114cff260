"""Settings of the C library's allocator for large temporaries that come and go every layer.

By default glibc takes blocks above 128 KiB to 32 MiB from the kernel one by one and hands them back when
freed, so that every temporary of a training step is paged in again, zeroed page by page. Kept in the heap,
the same pages serve the next layer. `malloc_trim` still gives them back when asked.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEP = (1 << 31) - 1 - 4096
"""mallopt takes an int: never shrink the heap below 2 GiB of free space at its end."""
PAD = 64 << 20
"""Grow the heap in steps of 64 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Whether the allocator was tuned, and why not."""

    applied: bool
    reason: str


@functools.cache
def tune() -> Tuning:
    """Keep large blocks in the heap; once a process."""
    libc = _glibc()
    if libc is None:
        return Tuning(applied=False, reason=f"the C library is {platform.libc_ver()[0] or 'not glibc'}")
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, KEEP), (M_TOP_PAD, PAD))
    refused = [parameter for parameter, value in settings if libc.mallopt(parameter, value) != 1]
    if refused:
        return Tuning(applied=False, reason=f"mallopt refused parameters {refused}")
    return Tuning(applied=True, reason="large blocks stay in the heap")


def trim() -> bool:
    """Give free heap pages back to the system; False where the C library cannot, or had none."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
