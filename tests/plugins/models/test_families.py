"""What each family reads from config.json, and what it refuses to compute wrongly."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from grpo_core.config import Config
from grpo_core.errors import ConfigError
from grpo_core.impl import DeviceInfo
from grpo_models.llama import Llama
from grpo_models.plugin import grpo_models
from grpo_models.qwen2_5 import Qwen2
from grpo_models.qwen3 import Qwen3

# The published config.json of Qwen2.5-0.5B-Instruct, Qwen3-0.6B and Llama-3.2-1B-Instruct (transformers 4).
QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA32: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
FAMILIES = [(Qwen2(), QWEN25), (Qwen3(), QWEN3), (Llama(), LLAMA32)]


def test_qwen25_as_published() -> None:
    arch = Qwen2().arch(QWEN25)
    mixer = arch.layers[0].mixer
    assert (mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim) == (14, 2, 64)
    assert (mixer.qkv_bias, mixer.out_bias, mixer.qk_norm, mixer.window) == (True, False, False, None)
    assert mixer.rope.theta == 1e6 and mixer.rope.rotary_dim == 64
    assert len(arch.layers) == 24 and arch.tie_word_embeddings and arch.rms_norm_eps == 1e-6
    assert arch.layers[0].ffn.intermediate_size == 4864 and not arch.layers[0].ffn.bias
    assert dict(arch.hf_config) == QWEN25


def test_qwen3_as_published() -> None:
    arch = Qwen3().arch(QWEN3)
    mixer = arch.layers[27].mixer
    assert mixer.head_dim == 128 and mixer.num_attention_heads * mixer.head_dim != arch.hidden_size
    assert mixer.qk_norm and not mixer.qkv_bias and not mixer.out_bias


def test_llama32_as_published() -> None:
    arch = Llama().arch(LLAMA32)
    rope = arch.layers[0].mixer.rope
    assert rope.scaling["rope_type"] == "llama3" and rope.scaling["factor"] == 32.0
    assert rope.theta == 5e5 and rope.max_position_embeddings == 131072


def test_parameter_counts_of_the_published_models() -> None:
    for family, config, millions in ((Qwen2(), QWEN25, 494), (Qwen3(), QWEN3, 596), (Llama(), LLAMA32, 1236)):
        shapes = family.weights(family.arch(config)).hf_names().values()
        total = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
        assert round(total / 1e6) == millions, family.name


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_scaling", {"rope_type": "proportional"}),
        ("num_attention_heads", 0),
        ("num_hidden_layers", None),
        ("vocab_size", "many"),
        ("intermediate_size", True),
        ("head_dim", 63),
        ("rms_norm_eps", 0.0),
    ],
)
@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_unsupported_setting_is_named(
    family: Any, config: dict[str, Any], setting: str, value: object
) -> None:
    with pytest.raises(ConfigError, match="rope_type" if setting == "rope_scaling" else setting):
        family.arch(config | {setting: value})


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_heads_that_cannot_share_are_refused(family: Any, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="evenly"):
        family.arch(config | {"num_key_value_heads": 3})


def windows(family: Any, config: dict[str, Any]) -> list[int | None]:
    return [layer.mixer.window for layer in family.arch(config).layers]


@pytest.mark.parametrize(("family", "config"), FAMILIES[:2])
def test_window_is_on_from_max_window_layers(family: Any, config: dict[str, Any]) -> None:
    small = config | {
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 3,
    }
    assert windows(family, small) == [None, None, None, 7]
    assert windows(family, small | {"max_window_layers": 9}) == [None] * 4
    assert windows(family, small | {"use_sliding_window": False}) == [None] * 4


def test_windows_by_layer_types() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = QWEN25 | {
        "num_hidden_layers": 2,
        "layer_types": kinds,
        "use_sliding_window": True,
        "sliding_window": 5,
    }
    assert windows(Qwen2(), config) == [None, 5]
    with pytest.raises(ConfigError, match="use_sliding_window"):
        Qwen2().arch(config | {"use_sliding_window": False})
    with pytest.raises(ConfigError, match="layer_types"):
        Qwen2().arch(config | {"layer_types": kinds[:1]})
    with pytest.raises(ConfigError, match="chunked_attention"):
        Qwen2().arch(config | {"layer_types": ["full_attention", "chunked_attention"]})


def test_transformers_5_keeps_the_same_model() -> None:
    import transformers

    for family, config in FAMILIES:
        name = config["architectures"][0].removesuffix("ForCausalLM")
        saved = getattr(transformers, f"{name}Config")(**config).to_dict()
        again, first = family.arch(saved), family.arch(config)
        assert again.layers[0].mixer.rope.theta == first.layers[0].mixer.rope.theta
        assert (again.layers, again.vocab_size, again.tie_word_embeddings) == (
            first.layers, first.vocab_size, first.tie_word_embeddings,
        )  # fmt: skip


def test_every_architecture_is_claimed_once() -> None:
    claimed = [name for family in grpo_models() for name in family.architectures]
    assert sorted(claimed) == [
        "DeepseekV3ForCausalLM", "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
    ]  # fmt: skip


@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_recipe_has_keys_of_the_config(family: Any, config: dict[str, Any]) -> None:
    sections = Config.model_fields
    for key in family.recipe(family.arch(config), DeviceInfo(type="cpu"), 1):
        section, name = key.split(".")
        assert name in sections[section].annotation.model_fields, key


def test_plugin_and_arch_load_no_torch() -> None:
    code = (
        "import sys\nfrom grpo_models.plugin import grpo_models\n"
        "from grpo_core.impl import DeviceInfo\n"
        "f = next(iter(grpo_models())); f.chat()\n"
        f"f.recipe(f.arch({LLAMA32!r}), DeviceInfo(type='cpu'), 1)\n"
        "sys.exit(', '.join(n for n in ('torch', 'transformers', 'safetensors') if n in sys.modules) or None)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
