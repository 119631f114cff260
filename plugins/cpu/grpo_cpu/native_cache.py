"""attention.cache, .prefill, .decode and .step of the C++ pack: a paged cache with shared prefixes.

A block holds 32 tokens of one key/value head, laid out for the bf16 dot-product instruction: keys
[D / 2][32][2], values [16][E][2]. A slot is a row of a table: its blocks in the order of its tokens, of
which the first may be its parent's. Blocks are spared for the rooms' round-up, so that a room is refused only
when `max_tokens` or `max_slots` is reached, never for fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, LayerCache

from .native import load
from .native_table import BLOCK, SlotTable

_ops = load()


class PagedLayer:
    """One layer of `PagedCache`."""

    __slots__ = ("keys", "table", "values")

    def __init__(self, table: SlotTable) -> None:
        self.table = table
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError, before anything is written, for a position outside of
        its slot's own room."""
        _ops.cache_write(self.keys, self.values, self.table.rows, k_TKD, v_TKE, slots_T, positions_T)


class PagedCache:
    """attention.cache of the pack, bfloat16. Raises ValueError for another dtype or head size."""

    layers: Sequence[LayerCache]

    def __init__(self, spec: CacheSpec) -> None:
        sizes = (spec.head_dim, spec.v_head_dim)
        if spec.dtype != torch.bfloat16 or any(size % 32 or not 0 < size <= 256 for size in sizes):
            raise ValueError(
                f"this cache holds bfloat16 heads of 32, 64, ... 256, not {spec.dtype} of {sizes}"
            )
        self.spec = spec
        self.table = SlotTable(spec.max_slots, spec.max_tokens)
        self._layers = [PagedLayer(self.table) for _ in range(spec.num_layers)]
        self.layers = self._layers
        self.restore()

    def allocate(self, length: int) -> int | None:
        """See `KVCache.allocate`."""
        return self.table.open(length, parent=None, prefix=0)

    def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
        """See `KVCache.fork`."""
        return self.table.open(length, parent=slot, prefix=prefix)

    def free(self, slot: int) -> None:
        """See `KVCache.free`. Raises ValueError for a slot that is not alive."""
        self.table.free(slot)

    def reset(self) -> None:
        """See `KVCache.reset`."""
        self.table.reset()

    def nbytes(self) -> int:
        """Bytes of keys and values reserved; the system backs them with memory when they are first used."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def release(self) -> None:
        """See `KVCache.release`. Raises RuntimeError while a slot is alive."""
        if self.table.alive:
            raise RuntimeError(f"{self.table.alive} slots are alive: free them before releasing the cache")
        for layer in self._layers:
            layer.keys, layer.values = torch.empty(0), torch.empty(0)

    def restore(self) -> None:
        """See `KVCache.restore`."""
        spec, blocks = self.spec, self.table.num_blocks
        for layer in self._layers:
            # Uninitialised on purpose: kernels read no token that was not written.
            shape = (blocks, spec.num_key_value_heads)
            layer.keys = torch.empty(*shape, spec.head_dim // 2, BLOCK, 2, dtype=spec.dtype)
            layer.values = torch.empty(*shape, BLOCK // 2, spec.v_head_dim, 2, dtype=spec.dtype)


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
) -> Tensor:
    """attention.prefill over a `PagedLayer`."""
    layer = _paged(cache)
    return _ops.cache_attend(
        layer.keys, layer.values, layer.table.rows, q_THD, cu_seqlens_q, seqlens_k, slots, scale, window or 0
    )


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None
) -> Tensor:
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
