"""What all layers of one forward pass have in common: its lengths on the host, and what offers make of them.

A length that lives on the device costs a wait to read, and each layer would wait again. Whoever packs a batch
knows its lengths; this hands them on, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Common:
    """One forward pass. All of it only saves work: the tensors of a call say the same.

    `cu_seqlens`, `parents` and `seqlens_k` are given as lists or numpy arrays, or as functions that give one,
    and read as lists of ints, or None where the pass has none.
    """

    __slots__ = ("_cu_seqlens", "_kept", "_parents", "_seqlens_k", "max_seqlen_k")

    def __init__(
        self, *, cu_seqlens: Sequence[int] | Any = None, parents: Sequence[int] | Any = None,
        seqlens_k: Sequence[int] | Any = None, max_seqlen_k: int = 0,
    ) -> None:  # fmt: skip
        self._cu_seqlens = cu_seqlens
        self._parents = parents
        self._seqlens_k = seqlens_k
        self.max_seqlen_k = max_seqlen_k
        """No sequence has more keys. A step that a graph records has the same bound in every replay."""
        self._kept: dict[Hashable, Any] = {}

    @property
    def cu_seqlens(self) -> list[int] | None:
        """[S + 1]: the ends of the segments of queries, with the leading 0."""
        self._cu_seqlens = found = _listed(self._cu_seqlens)
        return found

    @property
    def parents(self) -> list[int] | None:
        """[S]: the segment whose keys a segment sees besides its own, or -1."""
        self._parents = found = _listed(self._parents)
        return found

    @property
    def seqlens_k(self) -> list[int] | None:
        """[B]: cached keys of each sequence, new ones included."""
        self._seqlens_k = found = _listed(self._seqlens_k)
        return found

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave for this key in an earlier layer of the pass, or gives now."""
        if key not in self._kept:
            self._kept[key] = make()
        value: T = self._kept[key]
        return value


def _listed(values: Any) -> list[int] | None:
    if callable(values):
        values = values()
    if values is None or isinstance(values, list):
        return values
    return values.tolist() if hasattr(values, "tolist") else list(values)
