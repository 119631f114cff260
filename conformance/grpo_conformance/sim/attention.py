"""Attention over a paged cache with pages of 128 tokens, in torch on the device.

A sequence's keys are gathered page by page and attended as the reference does, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, LayerCache
from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import attend, bounds, visible
from grpo_core.ops.reference.pages import PageCache, PageTable

from .offers import PAGE


class PagedLayer:
    """One layer of `PagedCache`: pages of keys and values."""

    __slots__ = ("k_PKD", "table", "v_PKE")

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools, [pages, PAGE, heads, dim], for the keys and the values."""
        self.k_PKD, self.v_PKE = pools

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.rows(slots_T, positions_T)
        self.k_PKD.flatten(0, 1)[rows_T] = k_TKD.to(self.k_PKD.dtype)
        self.v_PKE.flatten(0, 1)[rows_T] = v_TKE.to(self.v_PKE.dtype)

    def read(self, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens of a slot."""
        pages = self.table.pages_SP[slot, : -(-length // PAGE)]
        return self.k_PKD[pages].flatten(0, 1)[:length], self.v_PKE[pages].flatten(0, 1)[:length]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another."""
        for pool in (self.k_PKD, self.v_PKE):
            pool[target, :tokens] = pool[source, :tokens]


class PagedCache(PageCache[PageTable, PagedLayer]):
    """See `grpo_core.ops.attention.KVCache`. A prefix's full pages are shared, the rest is copied."""

    def __init__(self, spec: CacheSpec) -> None:
        table = PageTable(spec.max_slots, spec.max_tokens, spec.device, PAGE)
        layers = [PagedLayer(table) for _ in range(spec.num_layers)]
        rows = (table.num_pages, PAGE, spec.num_key_value_heads)
        super().__init__(
            spec, table, layers, ((*rows, spec.head_dim), (*rows, spec.v_head_dim)), fill=torch.empty
        )


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
    """See `grpo_core.ops.attention.Prefill`, over a `PagedLayer`."""
    if not isinstance(cache, PagedLayer):
        raise TypeError(f"the simulated device reads pages, not {type(cache).__name__}")
    ends = bounds(cu_seqlens_q, q_THD.shape[0], common)
    outputs = [q_THD.new_zeros(0, q_THD.shape[1], cache.v_PKE.shape[3])]
    for (start, end), slot, length in zip(pairwise(ends), slots.tolist(), seqlens_k.tolist(), strict=True):
        if start == end:
            continue
        at = torch.arange(length, device=q_THD.device)
        seen_QS = visible(at[length - (end - start) :], at, causal=True, window=window)
        outputs.append(attend(q_THD[start:end], *cache.read(slot, length), seen_QS, scale))
    return torch.cat(outputs)


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`: all sequences at once, over as many pages as one may have.

    A graph can record it where `common` says how long that is.
    """
    if not isinstance(cache, PagedLayer):
        raise TypeError(f"the simulated device reads pages, not {type(cache).__name__}")
    most = 0 if common is None else common.max_seqlen_k
    if not most and seqlens_k.numel():
        most = int(seqlens_k.max())
    return attend_pages(q_BHD, cache, seqlens_k, slots, scale, window, most=most)


def attend_pages(
    q_BHD: Tensor, layer: PagedLayer, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    *, most: int,
) -> Tensor:  # fmt: skip
    """One query of each sequence over the pages of `most` tokens, in float32; the host waits for nothing."""
    B, H, D = q_BHD.shape
    K = layer.k_PKD.shape[2]
    pages_BP = layer.table.pages_SP[slots, : -(-most // PAGE)].clamp_min(0)
    k_BSKD, v_BSKE = (pool[pages_BP].flatten(1, 2).float() for pool in (layer.k_PKD, layer.v_PKE))
    at_S = torch.arange(k_BSKD.shape[1], device=q_BHD.device)
    seen_BS = at_S < seqlens_k[:, None]
    if window is not None:
        seen_BS = seen_BS & (at_S >= seqlens_k[:, None] - window)
    # Memory that nobody has written may hold NaN, which a weight of 0 does not take away.
    k_BSKD, v_BSKE = (x.masked_fill(~seen_BS[:, :, None, None], 0.0) for x in (k_BSKD, v_BSKE))
    q_BKGD = q_BHD.float().reshape(B, K, H // K, D)
    scores_BKGS = (q_BKGD @ k_BSKD.permute(0, 2, 3, 1)) * scale
    weights_BKGS = scores_BKGS.masked_fill(~seen_BS[:, None, None], -torch.inf).softmax(-1)
    o_BKGE = weights_BKGS @ v_BSKE.permute(0, 2, 1, 3)
    return o_BKGE.reshape(B, H, v_BSKE.shape[3]).to(q_BHD.dtype)
