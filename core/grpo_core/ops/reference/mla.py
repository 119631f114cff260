"""Multi-head latent attention in plain torch: the specification of every `mla.*` op.

Keys and values are expanded from the latent and attended as any others (DeepSeek-V2, arXiv 2405.04434,
equations 9 to 19); everything is computed in float32 (float64 for float64 inputs) and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..attention import CacheSpec
from ..common import Common
from ..mla import LatentLayer
from .attention import accumulate, attend, bounds, shared_prefix, visible
from .slots import SlotCache
from .tokens import TokenTable


def expand(latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor, w_uv_HEL: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [T, H, N + R] and values [T, H, E] of a latent and its shared rotary keys."""
    acc = accumulate(latent_TL.dtype)
    wide_TL = latent_TL.to(acc)
    k_nope_THN = torch.einsum("tl,hnl->thn", wide_TL, w_uk_HNL.to(acc))
    k_rope_THR = k_rope_TR.to(acc)[:, None].expand(-1, w_uk_HNL.shape[0], -1)
    v_THE = torch.einsum("tl,hel->the", wide_TL, w_uv_HEL.to(acc))
    return torch.cat([k_nope_THN, k_rope_THR], -1), v_THE


def varlen(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    latent_TL: Tensor,
    k_rope_TR: Tensor,
    w_uk_HNL: Tensor,
    w_uv_HEL: Tensor,
    *,
    cu_seqlens: Tensor,
    parents: Tensor | None,
    max_seqlen: int,
    scale: float,
    common: Common | None = None,
) -> Tensor:
    """Reference of `mla.varlen`."""
    k_THD, v_THE = expand(latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    alone = torch.full((cu_seqlens.numel() - 1,), -1, dtype=torch.int32)
    o_THE = shared_prefix(
        torch.cat([q_nope_THN, q_rope_THR], -1).to(k_THD.dtype),
        k_THD,
        v_THE,
        cu_seqlens=cu_seqlens,
        parents=alone if parents is None else parents,
        max_seqlen=max_seqlen,
        scale=scale,
        window=None,
        # Without parents it may say so, which the list of none that stands for them does not.
        common=None if parents is None else common,
    )
    return o_THE.to(q_nope_THN.dtype)


class DenseLatentLayer:
    """One layer of `DenseLatentCache`: rows of latents and rotary keys, found through the cache's table."""

    __slots__ = ("k_rope_XR", "latent_XL", "table")

    def __init__(self, table: TokenTable) -> None:
        self.table = table
        self.hold([torch.empty(0), torch.empty(0)])

    def hold(self, pools: Sequence[Tensor]) -> None:
        """Use these pools for the latents and the rotary keys."""
        self.latent_XL, self.k_rope_XR = pools

    def write(self, latent_TL: Tensor, k_rope_TR: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LatentLayer.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.rows(slots_T, positions_T)
        self.latent_XL[rows_T] = latent_TL.to(self.latent_XL.dtype)
        self.k_rope_XR[rows_T] = k_rope_TR.to(self.k_rope_XR.dtype)


class DenseLatentCache(SlotCache[TokenTable, DenseLatentLayer]):
    """Reference of `mla.cache`: a pool of token rows, a shared prefix stored once."""

    def __init__(self, spec: CacheSpec) -> None:
        table = TokenTable(spec.max_slots, spec.max_tokens, spec.device)
        layers = [DenseLatentLayer(table) for _ in range(spec.num_layers)]
        super().__init__(spec, table, layers, latent_shapes(spec))


def latent_shapes(spec: CacheSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of a layer's pools of latents and rotary keys. Raises ValueError for sizes of another kind."""
    rotary = spec.head_dim - spec.v_head_dim
    if spec.num_key_value_heads != 1 or rotary < 0:
        raise ValueError(
            f"a latent cache has one head of L + R with values of L, not {spec.num_key_value_heads} of "
            f"{spec.head_dim} with values of {spec.v_head_dim}"
        )
    return (spec.max_tokens, spec.v_head_dim), (spec.max_tokens, rotary)


def prefill(
    q_nope_THN: Tensor,
    q_rope_THR: Tensor,
    cache: LatentLayer,
    w_uk_HNL: Tensor,
    w_uv_HEL: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    slots: Tensor,
    scale: float,
    common: Common | None = None,
) -> Tensor:
    """Reference of `mla.prefill` over a `DenseLatentLayer`."""
    layer = _dense(cache)
    ends = bounds(cu_seqlens_q, q_nope_THN.shape[0], common)
    acc = accumulate(q_nope_THN.dtype)
    q_THD = torch.cat([q_nope_THN, q_rope_THR], -1).to(acc)
    outputs = [q_THD.new_zeros(0, *w_uv_HEL.shape[:2])]
    for (start, end), slot, length in zip(pairwise(ends), slots.tolist(), seqlens_k.tolist(), strict=True):
        if start == end:
            continue
        at = torch.arange(int(length), device=q_THD.device)
        rows_S = layer.table.rows(torch.full_like(at, int(slot)), at)
        k_SHD, v_SHE = expand(layer.latent_XL[rows_S], layer.k_rope_XR[rows_S], w_uk_HNL, w_uv_HEL)
        seen_QS = visible(at[at.numel() - (end - start) :], at, causal=True, window=None)
        outputs.append(attend(q_THD[start:end], k_SHD.to(acc), v_SHE.to(acc), seen_QS, scale))
    return torch.cat(outputs).to(q_nope_THN.dtype)


def decode(
    q_nope_BHN: Tensor,
    q_rope_BHR: Tensor,
    cache: LatentLayer,
    w_uk_HNL: Tensor,
    w_uv_HEL: Tensor,
    *,
    seqlens_k: Tensor,
    slots: Tensor,
    scale: float,
    common: Common | None = None,
) -> Tensor:
    """Reference of `mla.decode`: a prefill of one token for each sequence."""
    one_each = torch.arange(q_nope_BHN.shape[0] + 1, dtype=torch.int32, device=q_nope_BHN.device)
    return prefill(
        q_nope_BHN,
        q_rope_BHR,
        cache,
        w_uk_HNL,
        w_uv_HEL,
        cu_seqlens_q=one_each,
        seqlens_k=seqlens_k,
        slots=slots,
        scale=scale,
    )


def _dense(cache: LatentLayer) -> DenseLatentLayer:
    if not isinstance(cache, DenseLatentLayer):
        raise TypeError(f"the reference reads layers of DenseLatentCache, not {type(cache).__name__}")
    return cache
