"""A model as data: layers of (mixer, feed-forward) pairs with their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

NO_SCALING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of one kind of layer (Hugging Face names of its scaling)."""

    theta: float
    rotary_dim: int
    """Even; the first rotary_dim of head_dim dimensions turn."""
    scaling: Mapping[str, Any] = field(default_factory=lambda: NO_SCALING)
    """Hugging Face `rope_scaling`: rope_type "default", "linear", "dynamic", "llama3", "yarn", "longrope"."""
    interleaved: bool = False
    max_position_embeddings: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023)."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """Per-head RMSNorm on queries and keys before rotary (Qwen3)."""
    window: int | None = None
    output_gate: bool = False
    """The output is multiplied by sigmoid of a second projection of the input (Qwen3-Next)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    num_attention_heads: int
    q_lora_rank: int | None
    """None projects queries at once (Moonlight)."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope: Rope
    scale: float
    """Of the scores: (qk_nope_head_dim + qk_rope_head_dim)^-1/2, times yarn's mscale squared."""
    bias: bool = False
    """On the down projections and the output."""
    norm_eps: float = 1e-6
    """Of the norms of the two latents, whatever the model's rms_norm_eps is (as in transformers)."""
    latent_norm_eps: float = 1e-6
    """Of the norms of both latents; transformers and DeepSeek's own code do not give them rms_norm_eps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta:
    """Gated delta net with a short convolution (Yang et al. 2024, arXiv 2412.06464; Qwen3-Next)."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """SwiGLU feed-forward."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A mixture of SwiGLU experts beside an optional shared expert."""

    num_experts: int
    top_k: int
    intermediate_size: int
    """Of one expert."""
    score: str
    """"sigmoid" (DeepSeek-V3) or "softmax" (Qwen)."""
    norm_topk_prob: bool
    scale: float = 1.0
    """routed_scaling_factor."""
    num_groups: int = 1
    topk_groups: int = 1
    selection_bias: bool = False
    """A float32 bias that takes part in choosing and not in weighing (e_score_correction_bias); frozen."""
    shared_intermediate_size: int = 0
    """0 for no shared expert."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by sigmoid of a learned scalar product (Qwen)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MTP:
    """Layers that predict further tokens; left out of the decoder, kept for export."""

    num_layers: int
    layer: Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer."""

    mixer: Attention | MLA | GatedDelta
    ffn: DenseMLP | MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """A causal language model."""

    family: str
    """Name of the model plugin that made it."""
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float = 0.02
    zero_centered_norm: bool = False
    """Norms of layers, heads and the output multiply by 1 + w (Qwen3-Next)."""
    mtp: MTP | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    """The config.json that it came from, written back on export."""
