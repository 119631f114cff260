"""mla.cache: latents in pages of 64 tokens, rows of [latent | rotary key], the layout that FlashMLA reads.

To an attention with one key head it is a key/value cache whose values are the first L numbers of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.mla import latent_shapes
from grpo_core.ops.reference.pages import PageCache, PageTable

from .cache import PagedLayer, Reading, any_order
from .lengths import shared

PAGE = 64
"""Tokens of a page: FlashMLA's block size."""


class LatentPages(PagedLayer):
    """One layer of a latent cache: one pool, [pages, PAGE, 1, L + R]."""

    __slots__ = ("L",)

    def __init__(self, table: PageTable, L: int) -> None:
        self.L = L
        super().__init__(table)

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use this pool from now on; what it holds as values is a view of it."""
        self.k_PSKD = pools[0]
        self.v_PSKE = pools[0][..., : self.L]

    def write(  # type: ignore[override]
        self, latent_TL: Tensor, k_rope_TR: Tensor, *, slots_T: Tensor, positions_T: Tensor,
        common: Common | None = None,
    ) -> None:  # fmt: skip
        """See `LatentLayer.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = shared(common, "latent rows", lambda: self.table.rows(slots_T, positions_T))
        with any_order():
            self.k_PSKD.flatten(0, 2)[rows_T] = torch.cat([latent_TL, k_rope_TR], -1).to(self.k_PSKD.dtype)

    def reading(self, slots: Tensor, seqlens_k: Tensor, common: Common | None) -> Reading:
        """See `PagedLayer.reading`; kept apart from that of a model's other caches."""
        return shared(common, "latent reading", lambda: self.read(slots, seqlens_k, common))

    def read(self, slots: Tensor, seqlens_k: Tensor, common: Common | None) -> Reading:
        """`reading`, computed."""
        most = 0 if common is None else common.max_seqlen_k
        if not most and seqlens_k.numel():
            most = int(seqlens_k.max())
        pages = -(-most // PAGE)
        return Reading(
            blocks_BW=self.table.pages_SP[slots, :pages].clamp_min(0).to(torch.int32),
            used_B=seqlens_k.to(torch.int32),
            room=pages * PAGE,
        )

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another."""
        self.k_PSKD[target, :tokens] = self.k_PSKD[source, :tokens]

    def gather(self, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, L] and rotary keys [N, R] of these rows of the pool."""
        rows_NW = self.k_PSKD.flatten(0, 2).index_select(0, rows_N)
        return rows_NW[:, : self.L], rows_NW[:, self.L :]


class LatentPageCache(PageCache[PageTable, LatentPages]):
    """See `grpo_core.ops.mla.LatentCache`: full pages of a prefix are shared, its last tokens copied.

    Raises ValueError for sizes of another kind of cache.
    """

    def __init__(self, spec: CacheSpec) -> None:
        latent_shapes(spec)
        table = PageTable(spec.max_slots, spec.max_tokens, spec.device, PAGE)
        layers = [LatentPages(table, spec.v_head_dim) for _ in range(spec.num_layers)]
        # Zeros, not whatever memory held: a page is read whole, and 0 times a NaN is a NaN.
        super().__init__(spec, table, layers, ((table.num_pages, PAGE, 1, spec.head_dim),), torch.zeros)


def latents(cache: LatentLayer) -> LatentPages:
    """The layer, if it is one of a `LatentPageCache`. Raises TypeError otherwise."""
    if not isinstance(cache, LatentPages):
        raise TypeError(f"this attention reads layers of LatentPageCache, not {type(cache).__name__}")
    return cache
