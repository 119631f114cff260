"""What the dense families share: reading sizes, one attention layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo_core.model.arch import Arch, Attention, DenseMLP, Layer
from grpo_core.model.hf_config import check_arch, expect_common, read_rope, read_top, size


def dense_arch(
    family: str, config: Mapping[str, Any], *, head_dim: int, qkv_bias: bool, out_bias: bool, mlp_bias: bool,
    qk_norm: bool, windows: Sequence[int | None],
) -> Arch:  # fmt: skip
    """The `Arch` of a decoder whose layers differ in their window only.

    Raises `ConfigError` for a setting of config.json that would be computed wrongly.
    """
    expect_common(config)
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
            layers=tuple(Layer(mixer=Attention(**mixer, window=window), ffn=ffn) for window in windows),
            **read_top(config),
        )
    )


def divided_head_dim(config: Mapping[str, Any]) -> int:
    """`head_dim` where config.json has it, else hidden_size / num_attention_heads."""
    return size(config, "head_dim", size(config, "hidden_size") // size(config, "num_attention_heads"))
