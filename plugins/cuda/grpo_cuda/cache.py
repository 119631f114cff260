"""attention.cache in pages: of 256 tokens, as flash-attn and torch's varlen attention read them, or of 16.

Full pages of a prompt are shared by its forks; the page that a prompt ends in the middle of is copied. What
all layers of a pass need of the table (rows to write, pages to read) is computed once, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.reference.pages import PageCache, PageTable

from .bits import any_order
from .lengths import shared

PAGE = 256
"""Tokens of a page: flash-attn 2 reads pages of a multiple of 256."""
SMALL = 16


class Pages(PageTable):
    """A page table that looks up the rows of a pass once for all layers, not once each: that asks the device
    whether they are in bounds."""

    def __init__(self, spec: CacheSpec, page: int) -> None:
        self._looked_up: tuple[Tensor, Tensor, object, Tensor] | None = None
        self._layers: set[int] = set()
        """Layers that have had the rows looked up last."""
        super().__init__(spec.max_slots, spec.max_tokens, spec.device, page)

    def rows_for(self, layer: object, slots_T: Tensor, positions_T: Tensor) -> Tensor:
        """See `PageTable.rows`. A layer that asks for the same a second time is in another pass, before which
        the tensors may have been changed."""
        kept = self._looked_up
        same = kept is not None and kept[0] is slots_T and kept[1] is positions_T
        if kept is None or not same or kept[2] != _age(slots_T, positions_T) or id(layer) in self._layers:
            rows_T = self.rows(slots_T, positions_T)
            kept = self._looked_up = (slots_T, positions_T, _age(slots_T, positions_T), rows_T)
            self._layers.clear()
        self._layers.add(id(layer))
        return kept[3]

    def reset(self) -> None:
        """Free every slot."""
        self._looked_up = None
        super().reset()

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """See `PageTable.open`."""
        self._looked_up = None
        return super().open(length, parent=parent, prefix=prefix)

    def free(self, slot: int) -> None:
        """See `PageTable.free`."""
        self._looked_up = None
        super().free(slot)


def _age(*tensors: Tensor) -> object:
    """What tells changed tensors from unchanged ones; those of inference mode do not tell."""
    return None if any(x.is_inference() for x in tensors) else tuple(x._version for x in tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Pages of B sequences, the same for all layers of a pass."""

    blocks_BW: Tensor
    """int32: pages of each sequence; places after its last hold page 0."""
    used_B: Tensor
    """int32: tokens of each sequence."""
    room: int
    """Tokens that a row of `blocks_BW` has room for."""


class PagedLayer:
    """One layer of a paged cache: two pools, [pages, page size, heads, dim]."""

    __slots__ = ("k_PSKD", "table", "v_PSKE")
    kept_as = "reading"
    """A pass has one `Reading` of this name for all layers."""

    def __init__(self, table: Pages) -> None:
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools for the keys and the values."""
        self.k_PSKD, self.v_PSKE = pools

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.rows_for(self, slots_T, positions_T)
        with any_order():
            self.k_PSKD.flatten(0, 1)[rows_T] = k_TKD.to(self.k_PSKD.dtype)
            self.v_PSKE.flatten(0, 1)[rows_T] = v_TKE.to(self.v_PSKE.dtype)

    def reading(self, slots: Tensor, seqlens_k: Tensor, common: Common | None) -> Reading:
        """Where the keys of B sequences lie."""

        def make() -> Reading:
            most = 0 if common is None else common.max_seqlen_k
            if not most and seqlens_k.numel():
                most = int(seqlens_k.max())
            pages = -(-most // self.table.page_size)
            return Reading(
                blocks_BW=self.table.pages_SP[slots, :pages].clamp_min(0).to(torch.int32),
                used_B=seqlens_k.to(torch.int32),
                room=pages * self.table.page_size,
            )

        return shared(common, self.kept_as, make)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another."""
        for pool in (self.k_PSKD, self.v_PSKE):
            pool[target, :tokens] = pool[source, :tokens]


class PagedCache(PageCache[Pages, PagedLayer]):
    """See `grpo_core.ops.attention.KVCache`: full pages of a prefix are shared, its last tokens copied."""

    page = PAGE

    def __init__(self, spec: CacheSpec) -> None:
        table = Pages(spec, self.page)
        layers = [PagedLayer(table) for _ in range(spec.num_layers)]
        pages = (table.num_pages, self.page, spec.num_key_value_heads)
        # Zeros, not whatever memory held: a page is read whole, and 0 times a NaN is a NaN.
        super().__init__(
            spec, table, layers, ((*pages, spec.head_dim), (*pages, spec.v_head_dim)), torch.zeros
        )


class SmallPageCache(PagedCache):
    """Pages of 16 tokens: hardly any room is lost to what does not fill its last page."""

    page = SMALL


def paged(cache: LayerCache) -> PagedLayer:
    """The layer, if it is one of a `PagedCache`. Raises TypeError otherwise."""
    if not isinstance(cache, PagedLayer):
        raise TypeError(f"this attention reads layers of PagedCache, not {type(cache).__name__}")
    return cache
