"""attention.cache, .prefill, .decode and .step of the C++ pack: a paged cache with shared prefixes.

A block holds 32 tokens of one key/value head, laid out for the bf16 dot-product instruction: keys
[D / 2][32][2], values [16][E][2]. A slot is a row of a table: its blocks in the order of its tokens, of
which the first may be its parent's. Blocks are spared for the rooms' round-up, so that a room is refused only
when `max_tokens` or `max_slots` is reached, never for fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from grpo_core.ops.attention import CacheSpec, LayerCache
from torch import Tensor

from .native import load

BLOCK = 32
HEADER = 3
_ops = load()


@dataclass(slots=True)
class _Slot:
    blocks: list[int]
    """In the order of its tokens; the first `shared` belong to ancestors."""
    starts: list[int]
    """Position of each block's first token, then the end of the room."""
    shared: int
    own: int
    """Tokens of its own room."""
    parent: int | None
    children: int = 0
    freed: bool = False


class SlotTable:
    """Which blocks hold the tokens of a slot, as lists for bookkeeping and as an int32 tensor for kernels.

    A slot that was freed while it has children keeps its blocks and number until the last child goes.
    """

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.num_blocks = -(-max_tokens // BLOCK) + max_slots
        self.width = 0
        self.rows = torch.zeros(max_slots, 2 * self.width + HEADER + 1, dtype=torch.int32)
        self._slots: dict[int, _Slot] = {}
        self._free_slots: list[int] = []
        self._free_blocks: list[int] = []
        self._tokens = 0
        self.reset()

    @property
    def alive(self) -> int:
        """Slots in use, freed parents of living children included."""
        return len(self._slots)

    def reset(self) -> None:
        """Free every slot."""
        self._slots.clear()
        self._free_slots = list(range(self.max_slots - 1, -1, -1))
        self._free_blocks = list(range(self.num_blocks - 1, -1, -1))
        self._tokens = 0
        self.rows.zero_()

    def open(self, length: int, *, parent: int | None, prefix: int) -> int | None:
        """A slot with room for `length` tokens after `prefix` of its parent's, or None when full.

        Raises ValueError for a negative length, a parent that is not alive or a prefix that it has not.
        """
        if length < 0 or prefix < 0:
            raise ValueError(f"a slot of {length} tokens after a prefix of {prefix} makes no sense")
        blocks, starts = [], [0]
        if parent is not None:
            source = self._alive(parent)
            if prefix > source.starts[-1]:
                raise ValueError(f"slot {parent} holds {source.starts[-1]} tokens, fewer than prefix {prefix}")
            shared = sum(start < prefix for start in source.starts[:-1])
            blocks, starts = source.blocks[:shared], [*source.starts[:shared], prefix]
        if not self._free_slots or self._tokens + length > self.max_tokens:
            return None
        shared = len(blocks)
        for start in range(prefix, prefix + length, BLOCK):
            blocks.append(self._free_blocks.pop())
            starts.append(min(start + BLOCK, prefix + length))
        number = self._free_slots.pop()
        if parent is not None:
            self._slots[parent].children += 1
        self._slots[number] = _Slot(blocks, starts, shared, length, parent)
        self._tokens += length
        self._write_row(number)
        return number

    def free(self, slot: int) -> None:
        """Give a slot back. Raises ValueError when it is not alive."""
        self._alive(slot).freed = True
        at: int | None = slot
        while at is not None and self._slots[at].freed and self._slots[at].children == 0:
            gone = self._slots.pop(at)
            self._free_blocks.extend(reversed(gone.blocks[gone.shared :]))
            self._free_slots.append(at)
            self._tokens -= gone.own
            self.rows[at].zero_()
            at = gone.parent
            if at is not None:
                self._slots[at].children -= 1

    def _alive(self, slot: int) -> _Slot:
        entry = self._slots.get(slot)
        if entry is None or entry.freed:
            raise ValueError(f"slot {slot} is not alive")
        return entry

    def _write_row(self, number: int) -> None:
        slot = self._slots[number]
        if len(slot.blocks) > self.width:
            self._widen(max(len(slot.blocks), 2 * self.width))
        else:
            self.rows[number] = torch.tensor(self._row(number), dtype=torch.int32)

    def _row(self, number: int) -> list[int]:
        slot = self._slots[number]
        pad = [0] * (self.width - len(slot.blocks))
        owner = number if slot.parent is None else slot.parent
        return [len(slot.blocks), slot.shared, owner, *slot.starts, *pad, *slot.blocks, *pad]

    def _widen(self, width: int) -> None:
        self.width = width
        self.rows = torch.zeros(self.max_slots, 2 * width + HEADER + 1, dtype=torch.int32)
        for number in self._slots:
            self.rows[number] = torch.tensor(self._row(number), dtype=torch.int32)


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
            raise ValueError(f"this cache holds bfloat16 heads of 32, 64, ... 256, not {spec.dtype} of {sizes}")
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
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None,
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
    qkv_BW: Tensor, cache: LayerCache, *, cos_BR: Tensor, sin_BR: Tensor, positions: Tensor, slots: Tensor,
    num_heads: int, scale: float, window: int | None, interleaved: bool, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float,
) -> Tensor:
    """attention.step over a `PagedLayer`. Raises IndexError as `PagedLayer.write` does."""
    layer = _paged(cache)
    return _ops.cache_step(
        layer.keys, layer.values, layer.table.rows, qkv_BW, cos_BR, sin_BR, positions, slots, num_heads, scale,
        window or 0, interleaved, q_norm, k_norm, eps,
    )
