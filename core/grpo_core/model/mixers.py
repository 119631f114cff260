"""Grouped-query attention of the training decoder, and the choice of a layer's mixer."""

from __future__ import annotations

from torch import Tensor, nn

from .arch import MLA, Attention, GatedDelta, Layer
from .gated_delta import GatedDeltaMixer
from .layers import Maker, Packing
from .mla import MLAMixer


def mixer_name(layer: Layer) -> str:
    """The part of the neutral names that a layer's mixer has: "attn" or "linear_attn"."""
    return "linear_attn" if isinstance(layer.mixer, GatedDelta) else "attn"


def make_mixer(layer: Layer, make: Maker) -> nn.Module:
    """The module of a layer's mixer: (hidden [T, C], cos, sin, packing) -> [T, C]."""
    mixer = layer.mixer
    if isinstance(mixer, GatedDelta):
        return GatedDeltaMixer(mixer, make)
    if isinstance(mixer, MLA):
        return MLAMixer(mixer, make)
    return AttentionMixer(mixer, make)


class AttentionMixer(nn.Module):
    """Grouped-query attention over packed tokens: hidden [T, C] -> [T, C].

    With an output gate the heads' results are multiplied by sigmoid of a fourth part of the projection
    (Qwen3-Next).
    """

    def __init__(self, spec: Attention, make: Maker):
        super().__init__()
        self.spec, self.backend, self.arithmetic = spec, make.backend, make.arithmetic
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.parts = [heads, kv_heads, kv_heads] + [heads] * spec.output_gate
        hidden = make.arch.hidden_size
        self.qkv = make.linear(sum(self.parts) * dim, hidden, bias=spec.qkv_bias)
        self.out = make.linear(hidden, heads * dim, bias=spec.out_bias)
        if spec.qk_norm:
            self.q_norm = make.norm(dim)
            self.k_norm = make.norm(dim)

    def forward(self, x_TC: Tensor, cos_TR: Tensor, sin_TR: Tensor, packing: Packing) -> Tensor:
        spec, ops = self.spec, self.backend
        q_THD, k_TKD, v_TKD, *gate = (
            self.qkv(x_TC).unflatten(-1, (-1, spec.head_dim)).split(self.parts, dim=1)
        )
        if spec.qk_norm:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        common = packing.common
        q_THD, k_TKD = ops.rope.apply(
            q_THD, k_TKD, cos_TR, sin_TR, interleaved=spec.rope.interleaved, common=common
        )
        scale = spec.head_dim**-0.5
        if packing.parents is None:
            o_THD = ops.attention.varlen(
                q_THD, k_TKD, v_TKD, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen,
                scale=scale, causal=True, window=spec.window, common=common,
            )  # fmt: skip
        else:
            o_THD = ops.attention.shared_prefix(
                q_THD, k_TKD, v_TKD, cu_seqlens=packing.cu_seqlens, parents=packing.parents,
                max_seqlen=packing.max_seqlen, scale=scale, window=spec.window, common=common,
            )  # fmt: skip
        if gate:
            o_THD = o_THD * self.arithmetic.sigmoid(gate[0])
        return self.out(o_THD.flatten(1))  # type: ignore[no-any-return]
