"""What the dense families share: reading sizes, one attention layout, one recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from grpo_core.model.arch import Arch, Attention, DenseMLP, Layer
from grpo_core.model.hf_config import check_arch, expect_dense_decoder, read_rope, size

RECIPE: Mapping[str, Any] = MappingProxyType(
    {
        "train.lr": 1e-6,
        "train.max_grad_norm": 1.0,
        "rollout.temperature": 1.0,
        "rollout.top_k": 0,
        "rollout.top_p": 1.0,
    }
)
"""Full-parameter GRPO of an instruct model. Sampling is unfiltered whatever generation_config.json suggests
for chatting: a filter would make the sampled distribution another than the one that is trained."""


def dense_arch(
    family: str, config: Mapping[str, Any], *, head_dim: int, qkv_bias: bool, out_bias: bool, mlp_bias: bool,
    qk_norm: bool, windows: Sequence[int | None],
) -> Arch:  # fmt: skip
    """The `Arch` of a decoder whose layers differ in their window only.

    Raises `ConfigError` for a setting of config.json that would be computed wrongly.
    """
    expect_dense_decoder(config)
    heads = size(config, "num_attention_heads")
    mixer = {
        "num_attention_heads": heads,
        "num_key_value_heads": size(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "rope": read_rope(config, head_dim=head_dim),
        "qkv_bias": qkv_bias,
        "out_bias": out_bias,
        "qk_norm": qk_norm,
    }
    ffn = DenseMLP(intermediate_size=size(config, "intermediate_size"), bias=mlp_bias)
    return check_arch(
        Arch(
            family=family,
            vocab_size=size(config, "vocab_size"),
            hidden_size=size(config, "hidden_size"),
            layers=tuple(Layer(mixer=Attention(**mixer, window=window), ffn=ffn) for window in windows),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=size(config, "max_position_embeddings", 2048),
            initializer_range=float(config.get("initializer_range", 0.02)),
            hf_config=dict(config),
        )
    )


def divided_head_dim(config: Mapping[str, Any]) -> int:
    """`head_dim` where config.json has it, else hidden_size / num_attention_heads."""
    return size(config, "head_dim", size(config, "hidden_size") // size(config, "num_attention_heads"))
