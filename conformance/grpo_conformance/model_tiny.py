"""Tiny models of an architecture with random weights, made by transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .model_parts import randomise

LAYERS = 4
SIZES: Mapping[str, Any] = {
    "vocab_size": 53, "hidden_size": 36, "intermediate_size": 44, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2,
    # transformers computes no gradient for the embedding of a padding token.
    "pad_token_id": None,
    # Mixtures of experts, under the names that families have for the same thing.
    "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "num_experts": 8,
    "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 3,
    # Latent attention.
    "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8,
    # Gated delta nets.
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
}  # fmt: skip
"""What a tiny model has, where its config.json has that setting: no two sizes that could be mixed up are
equal, and few are powers of two."""
HEAD_DIM = 16
WINDOW = 5
GROUPS = 4
DROPPED = ("quantization_config", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map")
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "whole queries": {"q_lora_rank": None},
    "sigmoid groups": {"n_group": GROUPS, "topk_group": 2},
    "first layers dense": {"first_k_dense_replace": 1, "mlp_only_layers": [1]},
}
"""Settings that a family may have, and that change what it computes; those of them that an architecture's
config.json does not have drop out."""


def model_class(architecture: str) -> Any:
    """The class of transformers that an architecture names; None where this version has none."""
    import transformers

    return getattr(transformers, architecture, None)


def variants_of(known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants that differ from the plain one for a config with these settings."""
    found: dict[str, dict[str, Any]] = {}
    plain = shrunk(known)
    for name, changes in VARIANTS.items():
        fitting = {key: value for key, value in changes.items() if key in known and plain[key] != value}
        if fitting or not changes:
            found[name] = fitting
    return found


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with everything that has a size made small, and everything else as it is."""
    small = {key: value for key, value in config.items() if key not in DROPPED}
    # None means something of its own here: no compression, as many heads as queries have.
    kept = {key for key in ("q_lora_rank", "num_key_value_heads") if config.get(key) is None}
    small |= {key: value for key, value in SIZES.items() if key in config and key not in kept}
    latent = "qk_rope_head_dim" in small
    if latent:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "head_dim" in config and (latent or config["head_dim"] is not None):
        small["head_dim"] = small["qk_rope_head_dim"] if latent else HEAD_DIM
    if config.get("sliding_window"):
        small["sliding_window"] = WINDOW
    if config.get("max_window_layers"):
        small["max_window_layers"] = LAYERS // 2
    for key in ("n_group", "topk_group"):
        if (config.get(key) or 1) > 1:
            small[key] = GROUPS if key == "n_group" else GROUPS // 2
    if config.get("first_k_dense_replace"):
        small["first_k_dense_replace"] = 1
    if config.get("mlp_only_layers"):
        small["mlp_only_layers"] = [1]
    if isinstance(config.get("layer_types"), list):
        small["layer_types"] = few_layers(config["layer_types"])
    return small


def few_layers(types: list[str]) -> list[str]:
    """LAYERS kinds of layers in which every kind is."""
    kinds = list(dict.fromkeys(types))
    return [kinds[i * len(kinds) // LAYERS] for i in range(LAYERS)]


def tiny_model(architecture: str, config: Mapping[str, Any], changes: Mapping[str, Any], seed: int) -> Any:
    """A float32 `PreTrainedModel` in whose vectors nothing is zero or one by chance.

    Raises whatever transformers raises for settings that it does not take.
    """
    import torch

    kind = model_class(architecture)
    settings = {**shrunk(config), **changes, "architectures": [architecture]}
    torch.manual_seed(seed)
    model = kind(kind.config_class(**settings)).float().eval()
    assert math.isfinite(sum(float(x.detach().sum()) for x in model.parameters()))
    return randomise(model, seed)
