"""Cutting rows into pieces whose float32 temporaries stay in a core's second-level cache."""

from __future__ import annotations

from collections.abc import Iterator

ELEMENTS = 1 << 17
"""Elements of a piece: half a MiB of float32."""


def pieces(rows: int, width: int, elements: int = ELEMENTS) -> Iterator[slice]:
    """Slices over `rows` rows of `width` elements, one row at least in each."""
    size = max(1, elements // max(width, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))
