"""mla.cache in torch: a pool of rows [latent | rotary key], prompts shared by their forks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.slots import SlotCache

from .cache import SharedTable


class SharedLatentLayer:
    """One layer of `SharedLatentCache`."""

    __slots__ = ("L", "rows_XW", "table")

    def __init__(self, table: SharedTable, L: int) -> None:
        self.table = table
        self.L = L
        self.hold([torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use this pool of rows, W = L + R wide."""
        (self.rows_XW,) = pools

    def write(self, latent_TL: Tensor, k_rope_TR: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LatentLayer.write`. Raises IndexError for a position that its slot has no room for."""
        rows = self.table.write_rows(slots_T, positions_T)
        self.rows_XW[rows] = torch.cat([latent_TL, k_rope_TR], -1).to(self.rows_XW.dtype)


class SharedLatentCache(SlotCache[SharedTable, SharedLatentLayer]):
    """See `grpo_core.ops.mla.LatentCache`. Raises ValueError for a spec with several heads."""

    def __init__(self, spec: CacheSpec) -> None:
        if spec.num_key_value_heads != 1 or spec.v_head_dim > spec.head_dim:
            raise ValueError(
                f"a latent cache has one head of L + R with values of L, not {spec.num_key_value_heads} of "
                f"{spec.head_dim} with values of {spec.v_head_dim}"
            )
        table = SharedTable(spec.max_slots, spec.max_tokens, spec.device, 1)
        layers = [SharedLatentLayer(table, spec.v_head_dim) for _ in range(spec.num_layers)]
        super().__init__(spec, table, layers, [(spec.max_tokens, spec.head_dim)])


def shared_latents(cache: LatentLayer) -> SharedLatentLayer:
    """The layer as one of `SharedLatentCache`. Raises TypeError for another cache's."""
    if not isinstance(cache, SharedLatentLayer):
        raise TypeError(f"this attention reads layers of SharedLatentCache, not {type(cache).__name__}")
    return cache
