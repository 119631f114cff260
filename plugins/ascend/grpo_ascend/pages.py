"""Pages of 128 tokens, and what all layers of one pass over them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds
from grpo_core.ops.reference.pages import PageCache, PageTable

from .offers import PAGE

T = TypeVar("T")


class Pages(PageTable):
    """A page table whose answers are computed by the first layer of a pass and reused by the others.

    The first layer always asks anew, because callers may change their tensors between two passes.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self._shared: dict[str, tuple[tuple[object, ...], tuple[Tensor, ...], Any]] = {}
        super().__init__(spec.max_slots, spec.max_tokens, spec.device, PAGE)

    def reset(self) -> None:
        """Free every slot."""
        self._shared.clear()
        super().reset()

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """See `PageTable.open`."""
        self._shared.clear()
        return super().open(length, parent=parent, prefix=prefix)

    def free(self, slot: int) -> None:
        """See `PageTable.free`."""
        self._shared.clear()
        super().free(slot)

    def once(self, name: str, layer: int, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` gives, from an earlier layer of this pass where that had the same tensors."""
        key = tuple((id(x), None if x.is_inference() else x._version) for x in tensors)
        kept = self._shared.get(name)
        if layer == 0 or kept is None or kept[0] != key:
            kept = (key, tuple(tensors), make())
            self._shared[name] = kept
        value: T = kept[2]
        return value

    def slot_mapping(self, layer: int, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """int32 row of the pool for each token. Raises IndexError for a position outside of its slot."""
        return self.once(
            "rows", layer, (slots_T, positions_T), lambda: self.rows(slots_T, positions_T).to(torch.int32)
        )

    def block_table(
        self, layer: int, slots: Tensor, lengths: Sequence[int], common: Common | None = None
    ) -> Tensor:
        """int32 [B, pages of the longest sequence]; places after a sequence's last page hold page 0. With
        `common` the longest that may come: a step that a graph records has the same width in each replay."""
        bound = 0 if common is None else common.max_seqlen_k
        most = bound or max(lengths, default=0)
        pages = -(-most // PAGE)
        return self.once(
            f"blocks {pages}",
            layer,
            (slots,),
            lambda: self.pages_SP[slots, :pages].clamp_min(0).to(torch.int32).contiguous(),
        )

    def ends(self, layer: int, cu_seqlens: Tensor, tokens: int, common: Common | None = None) -> list[int]:
        """Ends of the segments on the host, with the leading 0. Raises ValueError as `bounds` does."""
        if common is not None and common.cu_seqlens is not None:
            return bounds(cu_seqlens, tokens, common)
        return self.once("ends", layer, (cu_seqlens,), lambda: bounds(cu_seqlens, tokens))

    def lengths(self, layer: int, seqlens: Tensor, more: int = 0, common: Common | None = None) -> list[int]:
        """Lengths on the host: those of `common`, or else `seqlens` with `more` added to each."""
        if common is not None and common.seqlens_k is not None:
            return common.seqlens_k
        return self.once(
            f"lengths {more}", layer, (seqlens,), lambda: [int(n) + more for n in seqlens.tolist()]
        )


class PagedLayer:
    """One layer of a paged cache: two pools, [pages, PAGE, heads, dim]."""

    __slots__ = ("first", "index", "second", "table")

    def __init__(self, index: int, table: Pages) -> None:
        self.index = index
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools from now on."""
        self.first, self.second = pools

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another."""
        for pool in (self.first, self.second):
            pool[target, :tokens] = pool[source, :tokens]

    def read(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Both pools' rows of the first tokens of a slot, [length, heads, dim]."""
        pages = self.table.pages_SP[slot, : -(-length // PAGE)]
        return self.first[pages].flatten(0, 1)[:length], self.second[pages].flatten(0, 1)[:length]


class PagedCache(PageCache[Pages, PagedLayer]):
    """A cache in pages of 128: full pages of a prefix are shared, its last tokens are copied."""

    def __init__(
        self, spec: CacheSpec, layer: Callable[[int, Pages], PagedLayer], rows: Sequence[tuple[int, int]]
    ) -> None:
        """`rows` are (heads, dim) of the two pools."""
        table = Pages(spec)
        layers = [layer(index, table) for index in range(spec.num_layers)]
        shapes = [(table.num_pages, PAGE, heads, dim) for heads, dim in rows]
        # Zeros, not whatever memory held: a page is read whole, and 0 times a NaN is a NaN.
        super().__init__(spec, table, layers, shapes, fill=torch.zeros)


def layer_of(cache: object, kind: type[PagedLayer]) -> PagedLayer:
    """The layer, if it is of this kind. Raises TypeError otherwise."""
    if not isinstance(cache, kind):
        raise TypeError(f"this reads layers of {kind.__name__}, not {type(cache).__name__}")
    return cache
