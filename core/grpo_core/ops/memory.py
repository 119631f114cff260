"""Contract of the memory hook: statistics, tagged regions, sleep and wake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStats:
    """Bytes in use; `by_tag` counts the tensors held under each tag, `peak` is the process's highest."""

    allocated: int
    reserved: int
    peak: int
    by_tag: Mapping[str, int]
    asleep: Mapping[str, str]
    """Tag -> where its content is kept ("host", "disk", "none") for tags that sleep."""


class Memory(Protocol):
    """Memory of one device."""

    def stats(self) -> MemoryStats: ...

    def reset_peak(self) -> None: ...

    def pool(self, tag: str) -> AbstractContextManager[None]:
        """Work under a tag: allocations inside count towards it where the device can tell."""
        ...

    def hold(self, tag: str, tensors: Iterable[Tensor]) -> None:
        """Put tensors under a tag, so that `sleep(tag)` frees their storage and `wake(tag)` refills it.

        The tensor objects stay the same; while asleep their storage has size 0.
        """
        ...

    def sleep(self, *tags: str, keep: Literal["host", "disk", "none"]) -> None:
        """Free the tensors of the tags; "none" forgets their content (wake then gives zeros)."""
        ...

    def wake(self, *tags: str) -> None: ...

    def empty_cache(self) -> None:
        """Give free memory back to the device or the system."""
        ...
