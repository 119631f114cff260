"""What the kinds of mixers and feed-forwards ask of their ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .impl import Need
from .model.arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE

if TYPE_CHECKING:
    from .needs import RunFacts

EXPERT_PARALLEL = 1
"""Ranks that share out the experts; the native engines keep all on each."""


def layer_needs(layer: Layer, arch: Arch, facts: RunFacts) -> list[Need]:
    """The needs of one layer's mixer and feed-forward, besides the norms before them."""
    mixer, ffn = layer.mixer, layer.ffn
    if isinstance(mixer, Attention):
        needs = _attention(mixer, arch, facts)
    elif isinstance(mixer, MLA):
        needs = _mla(mixer, facts)
    else:
        needs = _gated_delta(mixer, facts)
    return needs + (_mixture(ffn, arch, facts) if isinstance(ffn, MoE) else _dense(ffn, facts))


def bookkeeping_needs(arch: Arch, facts: RunFacts) -> list[Need]:
    """The cache of a model without attention: it holds no tokens, but its slots count the sequences."""
    if not all(isinstance(layer.mixer, GatedDelta) for layer in arch.layers):
        return []
    first = arch.layers[0].mixer
    assert isinstance(first, GatedDelta)
    sizes = {"head_dim": first.key_head_dim, "v_head_dim": first.value_head_dim}
    heads = {"dtype": facts.rollout_dtype, **sizes, "num_key_value_groups": 1, "window": False}
    return [Need(op="attention.cache", facts=heads)]


def both(op: str, sizes: Mapping[str, object], facts: RunFacts, *, required: bool = True) -> list[Need]:
    """An op of the decoder, which the trainer differentiates and the rollout runs in its own dtype."""
    return [
        Need(op=op, facts={"dtype": facts.train_dtype, **sizes}, backward=True, required=required),
        Need(op=op, facts={"dtype": facts.rollout_dtype, **sizes}, required=required),
    ]


def norm(size: int, zero_centered: bool, facts: RunFacts) -> list[Need]:
    """A norm over `size` features in both roles."""
    return both("norm.rms", {"hidden_size": size, "zero_centered": zero_centered}, facts)


def _attention(mixer: Attention, arch: Arch, facts: RunFacts) -> list[Need]:
    rope = mixer.rope
    heads: Mapping[str, object] = {
        "head_dim": mixer.head_dim,
        "v_head_dim": mixer.head_dim,
        "num_key_value_groups": mixer.num_attention_heads // mixer.num_key_value_heads,
        "window": mixer.window is not None,
    }
    train = {"dtype": facts.train_dtype, **heads}
    rollout = {"dtype": facts.rollout_dtype, **heads}
    step = {"qk_norm": mixer.qk_norm, "interleaved": rope.interleaved, "rotary_dim": rope.rotary_dim}
    needs = [
        *both("attention.varlen", heads, facts),
        Need(op="attention.shared_prefix", facts=train, backward=True, required=facts.share_prompt),
        Need(op="attention.cache", facts=rollout),
        Need(op="attention.prefill", facts=rollout),
        Need(op="attention.decode", facts=rollout),
        *_rope(rope.rotary_dim, mixer.head_dim, rope.interleaved, facts),
    ]
    if mixer.qk_norm:
        needs += norm(mixer.head_dim, arch.zero_centered_norm, facts)
    if not (mixer.qk_norm and arch.zero_centered_norm):
        # The fused step takes the heads' norms, but cannot be told that they are zero-centred.
        needs.append(Need(op="attention.step", facts={**rollout, **step}, required=False))
    return needs


def _mla(mixer: MLA, facts: RunFacts) -> list[Need]:
    heads: Mapping[str, object] = {
        "qk_nope_head_dim": mixer.qk_nope_head_dim,
        "qk_rope_head_dim": mixer.qk_rope_head_dim,
        "v_head_dim": mixer.v_head_dim,
        "kv_lora_rank": mixer.kv_lora_rank,
        "num_attention_heads": mixer.num_attention_heads,
    }
    train = {"dtype": facts.train_dtype, **heads, "shared_prefix": facts.share_prompt}
    rollout = {"dtype": facts.rollout_dtype, **heads}
    needs = [
        Need(op="mla.varlen", facts=train, backward=True),
        Need(op="mla.varlen", facts={**rollout, "shared_prefix": False}),
        Need(op="mla.cache", facts=rollout),
        Need(op="mla.prefill", facts=rollout),
        Need(op="mla.decode", facts=rollout),
        *_rope(mixer.rope.rotary_dim, mixer.qk_rope_head_dim, mixer.rope.interleaved, facts),
        *norm(mixer.kv_lora_rank, False, facts),
    ]
    return needs + (norm(mixer.q_lora_rank, False, facts) if mixer.q_lora_rank is not None else [])


def _gated_delta(mixer: GatedDelta, facts: RunFacts) -> list[Need]:
    heads: Mapping[str, object] = {
        "key_head_dim": mixer.key_head_dim,
        "value_head_dim": mixer.value_head_dim,
        "num_value_groups": mixer.num_value_heads // mixer.num_key_heads,
    }
    kernel: Mapping[str, object] = {"conv_kernel": mixer.conv_kernel}
    return [
        *both("gated_delta.chunk", heads, facts),
        Need(op="gated_delta.step", facts={"dtype": facts.rollout_dtype, **heads}),
        *both("short_conv.varlen", kernel, facts),
        Need(op="short_conv.step", facts={"dtype": facts.rollout_dtype, **kernel}),
        *norm(mixer.value_head_dim, False, facts),
        *both("mlp.swiglu", {"intermediate_size": mixer.num_value_heads * mixer.value_head_dim}, facts),
    ]


def _rope(rotary_dim: int, head_dim: int, interleaved: bool, facts: RunFacts) -> list[Need]:
    turned = {"rotary_dim": rotary_dim, "head_dim": head_dim, "interleaved": interleaved}
    return both("rope.apply", turned, facts)


def _dense(ffn: DenseMLP, facts: RunFacts) -> list[Need]:
    return both("mlp.swiglu", {"intermediate_size": ffn.intermediate_size}, facts)


def _mixture(ffn: MoE, arch: Arch, facts: RunFacts) -> list[Need]:
    sizes: Mapping[str, object] = {
        "num_experts": ffn.num_experts,
        "top_k": ffn.top_k,
        "score": ffn.score,
        "num_groups": ffn.num_groups,
        "hidden_size": arch.hidden_size,
        "intermediate_size": ffn.intermediate_size,
        "router_dtype": facts.router_dtype,
        "expert_parallel": EXPERT_PARALLEL,
    }
    needs = [
        need
        for part in ("route", "dispatch", "experts", "combine")
        for need in both(f"moe.{part}", sizes, facts)
    ]
    needs += both("moe.layer", sizes, facts, required=False)
    if ffn.shared_intermediate_size:
        needs += both("mlp.swiglu", {"intermediate_size": ffn.shared_intermediate_size}, facts)
    return needs
