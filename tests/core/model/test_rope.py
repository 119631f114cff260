"""Rotary tables against transformers', number for number, from both of its config styles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from grpo_core.errors import ConfigError
from grpo_core.model.arch import Rope
from grpo_core.model.hf_config import read_rope
from grpo_core.model.rope import inverse_frequencies, length_limit, rope_table

HEAD = 16
FACTORS = [1.0, 1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 4.0]
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn without the original length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with all settings": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 20.0,
        "beta_slow": 2.0, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.4,
    },
    "yarn with attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    "longrope": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": 64,
    },
    "longrope with factor": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 8.0,
        "original_max_position_embeddings": 64,
    },
    "longrope with attention_factor": {
        "rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "attention_factor": 1.3,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def config_dict(scaling: dict[str, Any], style: str) -> dict[str, Any]:
    base = {
        "hidden_size": 4 * HEAD, "num_attention_heads": 4, "head_dim": HEAD, "max_position_embeddings": 256,
    }  # fmt: skip
    if style == "transformers 5":
        return base | {"rope_parameters": scaling | {"rope_theta": 5000.0}}
    return base | {"rope_theta": 5000.0, "rope_scaling": dict(scaling)}


@pytest.mark.parametrize("style", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("name", SCALINGS)
def test_table_equals_transformers(name: str, style: str) -> None:
    config = config_dict(SCALINGS[name], style)
    rope = read_rope(config, head_dim=HEAD)
    positions = torch.tensor([0, 1, 5, 17, 40, 63])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config_dict(SCALINGS[name], style)))
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = rope_table(rope, positions, max_length=64)
    # The same float32 operations in the same order: nothing to round differently.
    assert torch.equal(ours[0], cos[0, :, : HEAD // 2])
    assert torch.equal(ours[1], sin[0, :, : HEAD // 2])
    assert ours[0].dtype == torch.float32


def test_old_key_type_names_the_scaling() -> None:
    old = read_rope(config_dict({"type": "linear", "factor": 2.0}, "transformers 4"), head_dim=HEAD)
    new = read_rope(config_dict({"rope_type": "linear", "factor": 2.0}, "transformers 5"), head_dim=HEAD)
    assert old == new


def test_theta_defaults_to_ten_thousand_as_in_transformers() -> None:
    assert (
        read_rope({"max_position_embeddings": 8}, head_dim=4).theta
        == LlamaConfig().rope_parameters["rope_theta"]
    )


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match="'mrope'"):
        read_rope({"rope_scaling": {"type": "mrope"}, "max_position_embeddings": 8}, head_dim=4)
    with pytest.raises(ConfigError, match="'mrope'"):
        inverse_frequencies(Rope(theta=1e4, rotary_dim=4, scaling={"rope_type": "mrope"}))


def test_incomplete_scaling_names_what_it_lacks() -> None:
    rope = Rope(theta=1e4, rotary_dim=4, scaling={"rope_type": "llama3", "factor": 2.0})
    with pytest.raises(ConfigError, match="low_freq_factor"):
        inverse_frequencies(rope)


def test_settings_for_each_kind_of_layer_are_refused() -> None:
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ConfigError, match="rope_parameters"):
        read_rope({"rope_parameters": nested, "max_position_embeddings": 8}, head_dim=4)


def test_partial_rotary_is_refused() -> None:
    config = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        read_rope(config | {"max_position_embeddings": 8}, head_dim=4)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("default", None), ("llama3", None), ("yarn", None), ("dynamic", 256), ("longrope", 64)],
)
def test_length_limit(name: str, limit: int | None) -> None:
    rope = read_rope(config_dict(SCALINGS[name], "transformers 5"), head_dim=HEAD)
    assert length_limit(rope) == limit
    positions = torch.arange(4)
    if limit is None:
        rope_table(rope, positions, max_length=100_000)
        return
    rope_table(rope, positions, max_length=limit)
    with pytest.raises(ConfigError, match=str(limit + 1)):
        rope_table(rope, positions, max_length=limit + 1)
