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


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """SwiGLU feed-forward."""

    intermediate_size: int
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer. Later families add further mixers and feed-forwards."""

    mixer: Attention
    ffn: DenseMLP


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
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    """The config.json that it came from, written back on export."""
