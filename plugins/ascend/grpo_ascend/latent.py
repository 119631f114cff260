"""Multi-head latent attention: expanded for training and prompts, absorbed for decode over latent pages."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch_npu
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer
from grpo_core.ops.reference.mla import latent_shapes

from .fusion import attend
from .lengths import key_plan
from .offers import PAGE
from .pages import PagedCache, PagedLayer, Pages, layer_of


def varlen(
    q_nope_THN: Tensor, q_rope_THR: Tensor, latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor,
    w_uv_HEL: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None, max_seqlen: int, scale: float,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaVarlen`: keys of N + R, values of E, which the vendor takes as they are."""
    plan = key_plan(cu_seqlens, parents, q_nope_THN.shape[0], common)
    k_THD, v_THE = _expand(latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    if plan.rows is not None:
        k_THD, v_THE = k_THD.index_select(0, plan.rows), v_THE.index_select(0, plan.rows)
    q_THD = torch.cat([q_nope_THN, q_rope_THR], -1)
    return attend(q_THD, k_THD, v_THE, plan.ends_q, plan.ends_k, scale=scale, causal=True, window=None)


def _expand(
    latent_TL: Tensor, k_rope_TR: Tensor, w_uk_HNL: Tensor, w_uv_HEL: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys [T, H, N + R] and values [T, H, E]."""
    H, N, L = w_uk_HNL.shape
    k_nope_THN = (latent_TL @ w_uk_HNL.reshape(H * N, L).t()).view(-1, H, N)
    v_THE = (latent_TL @ w_uv_HEL.reshape(-1, L).t()).view(-1, H, w_uv_HEL.shape[1])
    return torch.cat([k_nope_THN, k_rope_TR[:, None].expand(-1, H, -1)], -1), v_THE


class LatentPages(PagedLayer):
    """Latents and rotary keys of one layer, one head each."""

    __slots__ = ()

    def write(self, latent_TL: Tensor, k_rope_TR: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LatentLayer.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.slot_mapping(self.index, slots_T, positions_T)
        if rows_T.shape[0]:
            torch_npu.npu_scatter_pa_kv_cache(
                latent_TL.to(self.first.dtype)[:, None].contiguous(),
                k_rope_TR.to(self.second.dtype)[:, None].contiguous(),
                self.first,
                self.second,
                rows_T,
                cache_mode="Norm",
            )


class LatentPageCache(PagedCache):
    """See `grpo_core.ops.mla.LatentCache`. Raises ValueError for sizes of another kind of cache."""

    def __init__(self, spec: CacheSpec) -> None:
        (_, latent), (_, rotary) = latent_shapes(spec)
        super().__init__(spec, _layer, ((1, latent), (1, rotary)))


def _layer(index: int, table: Pages) -> PagedLayer:
    return LatentPages(index, table)


def prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaPrefill`, over `LatentPages`; what is in sight is gathered and expanded."""
    layer = layer_of(cache, LatentPages)
    lengths = layer.table.lengths(layer.index, seqlens_k, common=common)
    ends_q = layer.table.ends(layer.index, cu_seqlens_q, q_nope_THN.shape[0], common)
    if ends_q[-1] == 0:
        return q_nope_THN.new_zeros(0, *w_uv_HEL.shape[:2])
    # A sequence without new tokens has keys all the same, which no query reads.
    asked = [n if stop > start else 0 for n, (start, stop) in zip(lengths, pairwise(ends_q), strict=True)]
    read = [layer.read(int(slot), n) for slot, n in zip(slots.tolist(), asked, strict=True)]
    latent_TL = torch.cat([latent[:, 0] for latent, _ in read])
    k_rope_TR = torch.cat([rope[:, 0] for _, rope in read])
    ends_k = [0]
    for n in asked:
        ends_k.append(ends_k[-1] + n)
    k_THD, v_THE = _expand(latent_TL, k_rope_TR, w_uk_HNL, w_uv_HEL)
    q_THD = torch.cat([q_nope_THN, q_rope_THR], -1)
    return attend(q_THD, k_THD, v_THE, ends_q, ends_k, scale=scale, causal=True, window=None)


def decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`, over `LatentPages`: one key head of the latent serves all heads."""
    layer = layer_of(cache, LatentPages)
    if not q_nope_BHN.shape[0]:
        return q_nope_BHN.new_zeros(0, *w_uv_HEL.shape[:2])
    lengths = layer.table.lengths(layer.index, seqlens_k, common=common)
    q_BHL = torch.einsum("bhn,hnl->bhl", q_nope_BHN, w_uk_HNL)
    latents = layer.first.flatten(2)
    o_BH1L, _ = torch_npu.npu_fused_infer_attention_score_v2(
        q_BHL.unsqueeze(2).contiguous(),
        latents,
        latents,
        query_rope=q_rope_BHR.unsqueeze(2).contiguous(),
        key_rope=layer.second.flatten(2),
        actual_seq_kvlen=lengths,
        block_table=layer.table.block_table(layer.index, slots, lengths, common),
        num_query_heads=q_BHL.shape[1],
        softmax_scale=scale,
        input_layout="BNSD",
        num_key_value_heads=1,
        block_size=PAGE,
    )
    out: Tensor = torch.einsum("bhl,hel->bhe", o_BH1L.squeeze(2), w_uv_HEL)
    return out
