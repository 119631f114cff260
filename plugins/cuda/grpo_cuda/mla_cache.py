"""mla.cache: latents in pages of 64 tokens, rows of [latent | rotary key], the layout that FlashMLA reads.

To an attention with one key head it is a key/value cache whose values are the first L numbers of its keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.mla import latent_shapes
from grpo_core.ops.reference.pages import PageCache

from .bits import any_order
from .cache import PagedLayer, Pages

PAGE = 64
"""Tokens of a page: FlashMLA's block size."""


class LatentPages(PagedLayer):
    """One layer of a latent cache: one pool, [pages, PAGE, 1, L + R]."""

    __slots__ = ("L",)
    kept_as = "latent reading"

    def __init__(self, table: Pages, L: int) -> None:
        self.L = L
        super().__init__(table)

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use this pool from now on; what it holds as values is a view of it."""
        self.k_PSKD = pools[0]
        self.v_PSKE = pools[0][..., : self.L]

    def write(  # type: ignore[override]
        self, latent_TL: Tensor, k_rope_TR: Tensor, *, slots_T: Tensor, positions_T: Tensor
    ) -> None:
        """See `LatentLayer.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.rows_for(self, slots_T, positions_T)
        with any_order():
            self.k_PSKD.flatten(0, 2)[rows_T] = torch.cat([latent_TL, k_rope_TR], -1).to(self.k_PSKD.dtype)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one page to another."""
        self.k_PSKD[target, :tokens] = self.k_PSKD[source, :tokens]

    def gather(self, rows_N: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [N, L] and rotary keys [N, R] of these rows of the pool."""
        rows_NW = self.k_PSKD.flatten(0, 2).index_select(0, rows_N)
        return rows_NW[:, : self.L], rows_NW[:, self.L :]


class LatentPageCache(PageCache[Pages, LatentPages]):
    """See `grpo_core.ops.mla.LatentCache`: full pages of a prefix are shared, its last tokens copied.

    Raises ValueError for sizes of another kind of cache.
    """

    def __init__(self, spec: CacheSpec) -> None:
        latent_shapes(spec)
        table = Pages(spec, PAGE)
        layers = [LatentPages(table, spec.v_head_dim) for _ in range(spec.num_layers)]
        # Zeros, not whatever memory held: a page is read whole, and 0 times a NaN is a NaN.
        super().__init__(spec, table, layers, ((table.num_pages, PAGE, 1, spec.head_dim),), torch.zeros)


def latents(cache: LatentLayer) -> LatentPages:
    """The layer, if it is one of a `LatentPageCache`. Raises TypeError otherwise."""
    if not isinstance(cache, LatentPages):
        raise TypeError(f"this attention reads layers of LatentPageCache, not {type(cache).__name__}")
    return cache
