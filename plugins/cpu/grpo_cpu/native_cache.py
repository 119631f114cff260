"""attention.cache, .prefill, .decode and .step of the C++ pack: a paged cache with shared prefixes.

A block holds 32 tokens of one key/value head in units of 32 bits, a pair of bfloat16 as its dot-product
instruction reads them or one float32: keys [D / unit][32][unit], values [32 / unit][E][unit]. A slot is a row
of a table: its blocks in the order of its tokens, of which the first may be its parent's. Blocks are spared
for the rooms' round-up, so that a room is refused only when `max_tokens` or `max_slots` is reached, never for
fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.reference.slots import SlotCache

from .native import load
from .native_table import BLOCK, SlotTable

UNITS = {torch.bfloat16: 2, torch.float32: 1}
"""Elements of a unit."""
_ops = load()


class PagedLayer:
    """One layer of `PagedCache`."""

    __slots__ = ("keys", "table", "values")

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools for the keys and the values."""
        self.keys, self.values = pools

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError, before anything is written, for a position outside of
        its slot's own room."""
        _ops.cache_write(self.keys, self.values, self.table.rows, k_TKD, v_TKE, slots_T, positions_T)


class PagedCache(SlotCache[SlotTable, PagedLayer]):
    """attention.cache of the pack. Raises ValueError for another dtype or head size than it serves.

    The system backs the reserved bytes with memory when they are first used.
    """

    def __init__(self, spec: CacheSpec) -> None:
        sizes = (spec.head_dim, spec.v_head_dim)
        unit = UNITS.get(spec.dtype)
        if unit is None or any(size % 32 or not 0 < size <= 256 for size in sizes):
            raise ValueError(
                f"this cache holds bfloat16 or float32 heads of 32, 64, ... 256, not {spec.dtype} of {sizes}"
            )
        table = SlotTable(spec.max_slots, spec.max_tokens)
        shape = (table.num_blocks, spec.num_key_value_heads)
        shapes = (
            (*shape, spec.head_dim // unit, BLOCK, unit),
            (*shape, BLOCK // unit, spec.v_head_dim, unit),
        )
        layers = [PagedLayer(table) for _ in range(spec.num_layers)]
        # Uninitialised on purpose: kernels read no token that was not written.
        super().__init__(spec, table, layers, shapes, fill=torch.empty)


def _paged(cache: LayerCache) -> PagedLayer:
    if not isinstance(cache, PagedLayer):
        raise TypeError(f"the native attention reads layers of PagedCache, not {type(cache).__name__}")
    return cache


def prefill(
    q_THD: Tensor,
    cache: LayerCache,
    *,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    slots: Tensor,
    scale: float,
    window: int | None,
    common: Common | None = None,
) -> Tensor:
    """attention.prefill over a `PagedLayer`."""
    layer = _paged(cache)
    return _ops.cache_attend(
        layer.keys, layer.values, layer.table.rows, q_THD, cu_seqlens_q, seqlens_k, slots, scale, window or 0
    )


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """attention.decode over a `PagedLayer`."""
    layer = _paged(cache)
    return _ops.cache_attend(
        layer.keys, layer.values, layer.table.rows, q_BHD, None, seqlens_k, slots, scale, window or 0
    )


def step(
    qkv_BW: Tensor,
    cache: LayerCache,
    *,
    cos_BR: Tensor,
    sin_BR: Tensor,
    positions: Tensor,
    slots: Tensor,
    num_heads: int,
    scale: float,
    window: int | None,
    interleaved: bool,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    common: Common | None = None,
) -> Tensor:
    """attention.step over a `PagedLayer`. Raises IndexError as `PagedLayer.write` does."""
    layer = _paged(cache)
    return _ops.cache_step(
        layer.keys,
        layer.values,
        layer.table.rows,
        qkv_BW,
        cos_BR,
        sin_BR,
        positions,
        slots,
        num_heads,
        scale,
        window or 0,
        interleaved,
        q_norm,
        k_norm,
        eps,
    )
