"""Attention over pages with `npu_fused_infer_attention_score`: prefill in TND, decode in BNSD."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, LayerCache
from grpo_core.ops.common import Common

from .fusion import RIGHT_DOWN, causal_mask
from .norm import rms_norm
from .offers import PAGE
from .pages import PagedCache, PagedLayer, Pages, layer_of
from .rope import rope_apply


class KeyValueLayer(PagedLayer):
    """Keys and values of one layer, in the layout that the vendor calls Norm."""

    __slots__ = ()

    def write(self, k_TKD: Tensor, v_TKE: Tensor, *, slots_T: Tensor, positions_T: Tensor) -> None:
        """See `LayerCache.write`. Raises IndexError for a position that its slot has no room for."""
        rows_T = self.table.slot_mapping(self.index, slots_T, positions_T)
        if rows_T.shape[0]:
            torch_npu.npu_scatter_pa_kv_cache(
                k_TKD.to(self.first.dtype).contiguous(),
                v_TKE.to(self.second.dtype).contiguous(),
                self.first,
                self.second,
                rows_T,
                cache_mode="Norm",
            )


class KeyValueCache(PagedCache):
    """See `grpo_core.ops.attention.KVCache`."""

    def __init__(self, spec: CacheSpec) -> None:
        heads = spec.num_key_value_heads
        super().__init__(spec, _layer, ((heads, spec.head_dim), (heads, spec.v_head_dim)))


def _layer(index: int, table: Pages) -> PagedLayer:
    return KeyValueLayer(index, table)


def prefill(
    q_THD: Tensor, cache: LayerCache, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Prefill`, over a `KeyValueLayer`; without a window."""
    layer = layer_of(cache, KeyValueLayer)
    _no_window(window)
    if not q_THD.shape[0]:
        return torch.zeros_like(q_THD)
    lengths = layer.table.lengths(layer.index, seqlens_k, common=common)
    o_THD, _ = torch_npu.npu_fused_infer_attention_score(
        q_THD.contiguous(),
        layer.first.flatten(2),
        layer.second.flatten(2),
        atten_mask=causal_mask(q_THD.device),
        actual_seq_lengths=layer.table.ends(layer.index, cu_seqlens_q, q_THD.shape[0], common)[1:],
        actual_seq_lengths_kv=lengths,
        block_table=layer.table.block_table(layer.index, slots, lengths),
        num_heads=q_THD.shape[1],
        scale=scale,
        input_layout="TND",
        num_key_value_heads=layer.first.shape[2],
        sparse_mode=RIGHT_DOWN,
        block_size=PAGE,
    )
    out: Tensor = o_THD
    return out


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`, over a `KeyValueLayer`; without a window."""
    layer = layer_of(cache, KeyValueLayer)
    _no_window(window)
    lengths = layer.table.lengths(layer.index, seqlens_k, common=common)
    return attend_one(q_BHD, layer, lengths, slots, scale, common)


def attend_one(
    q_BHD: Tensor, layer: PagedLayer, lengths: list[int], slots: Tensor, scale: float, common: Common | None
) -> Tensor:
    """One query of each sequence over its pages."""
    if not q_BHD.shape[0]:
        return torch.zeros_like(q_BHD)
    o_BH1D, _ = torch_npu.npu_fused_infer_attention_score(
        q_BHD.unsqueeze(2).contiguous(),
        layer.first.flatten(2),
        layer.second.flatten(2),
        actual_seq_lengths_kv=lengths,
        block_table=layer.table.block_table(layer.index, slots, lengths, common),
        num_heads=q_BHD.shape[1],
        scale=scale,
        input_layout="BNSD",
        num_key_value_heads=layer.first.shape[2],
        block_size=PAGE,
    )
    out: Tensor = o_BH1D.squeeze(2)
    return out


def step(
    qkv_BW: Tensor, cache: LayerCache, *, cos_BR: Tensor, sin_BR: Tensor, positions: Tensor, slots: Tensor,
    num_heads: int, scale: float, window: int | None, interleaved: bool, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Step`, over a `KeyValueLayer`; without a window.

    Without `common` the host asks the NPU for the lengths, once for all layers with the same `positions`.
    """
    layer = layer_of(cache, KeyValueLayer)
    _no_window(window)
    kv_heads, dim = layer.first.shape[2:]
    qkv_BHD = qkv_BW.view(qkv_BW.shape[0], num_heads + 2 * kv_heads, dim)
    q_BHD, k_BKD, v_BKD = torch.split(qkv_BHD, [num_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        q_BHD = rms_norm(q_BHD, q_norm, eps=eps, residual=None, zero_centered=False)
    if k_norm is not None:
        k_BKD = rms_norm(k_BKD, k_norm, eps=eps, residual=None, zero_centered=False)
    q_BHD, k_BKD = rope_apply(q_BHD, k_BKD, cos_BR, sin_BR, interleaved=interleaved, common=common)
    cache.write(k_BKD, v_BKD, slots_T=slots, positions_T=positions)
    lengths = layer.table.lengths(layer.index, positions, more=1, common=common)
    return attend_one(q_BHD, layer, lengths, slots, scale, common).flatten(1)


def _no_window(window: int | None) -> None:
    if window is not None:
        raise ValueError("the vendor's decode ignores a window, so that none is offered over this cache")
