"""Settings of the C library's allocator for large temporaries that come and go every layer.

By default glibc takes blocks above 128 KiB to 32 MiB from the kernel one by one and hands them back when
freed, so that every temporary of a training step is paged in again, zeroed page by page. Kept in the heap,
the same pages serve the next layer. `malloc_trim` still gives them back when asked. Blocks above 32 MiB are
few and long-lived: between small ones they would only leave holes, so they stay outside of the heap.

oneDNN and ideep keep 1024 compiled primitives each, about 0.6 MB for every new number of rows; packed batches
and emptying rollouts have a new number at every step, so that a run would grow by a gigabyte.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGE = 32 << 20
"""The highest threshold that glibc takes."""
KEEP = (1 << 31) - 1 - 4096
"""mallopt takes an int: never shrink the heap below 2 GiB of free space at its end."""
PAD = 64 << 20
"""Grow the heap in steps of 64 MiB."""
PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""How many compiled primitives oneDNN and ideep keep; read once, before the first of them is made. A layer's
products need about 12."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Whether the allocator was tuned, and why not."""

    applied: bool
    reason: str


@functools.cache
def tune() -> Tuning:
    """Keep large blocks in the heap and compiled primitives few; once a process.

    A capacity that the user's environment sets stays.
    """
    for name, capacity in PRIMITIVES.items():
        os.environ.setdefault(name, capacity)
    libc = _glibc()
    if libc is None:
        return Tuning(applied=False, reason=f"the C library is {platform.libc_ver()[0] or 'not glibc'}")
    settings = ((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, KEEP), (M_TOP_PAD, PAD))
    refused = [parameter for parameter, value in settings if libc.mallopt(parameter, value) != 1]
    if refused:
        return Tuning(applied=False, reason=f"mallopt refused parameters {refused}")
    return Tuning(applied=True, reason="large blocks stay in the heap")


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
            "keepcost",
        )
    )  # fmt: skip


def free_bytes() -> int | None:
    """Bytes of the heap that nobody uses, given back to the system or not; None where glibc does not tell."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _Info
    free: int = libc.mallinfo2().fordblks
    return free


_givers: list[Callable[[], object]] = []


def on_release(give: Callable[[], object]) -> None:
    """Have `give` called whenever memory goes back to the system: it returns what it keeps itself."""
    _givers.append(give)


def release() -> None:
    """Have everyone return what memory they keep and nobody uses."""
    for give in _givers:
        give()


def trim() -> bool:
    """Give free heap pages back to the system; False where the C library cannot, or had none."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def _glibc() -> ctypes.CDLL | None:
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
