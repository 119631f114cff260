"""What the families with experts, latents and gated delta layers read, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from grpo_core.config import Config
from grpo_core.config_schema import annotation_at
from grpo_core.errors import ConfigError
from grpo_core.impl import DeviceInfo
from grpo_core.model.arch import Attention, DenseMLP, GatedDelta, MoE
from grpo_models.plugin import grpo_models

FOLDER = Path(__file__).parent / "published"
FAMILIES = {name: family for family in grpo_models() for name in family.architectures}
CPU = DeviceInfo(type="cpu", name="test processor", dtypes=frozenset({"float32", "bfloat16", "float64"}))
NARROW = DeviceInfo(type="acme", name="Acme One", dtypes=frozenset({"float32", "bfloat16"}))
QWEN, DEEPSEEK, NEXT, MOON = (
    json.loads((FOLDER / f"{name}.json").read_text())
    for name in (
        "Qwen3-30B-A3B", "DeepSeek-V3-0324", "Qwen3-Next-80B-A3B-Instruct", "Moonlight-16B-A3B-Instruct",
    )
)  # fmt: skip


def arch_of(config: dict[str, Any], **changes: Any) -> Any:
    return FAMILIES[config["architectures"][0]].arch(config | changes)


YARN = DEEPSEEK["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], str, Any]] = [
    *((config, "hidden_act", "gelu") for config in (QWEN, DEEPSEEK, NEXT)),
    *((config, "attention_dropout", 0.1) for config in (QWEN, DEEPSEEK, NEXT)),
    *((config, "norm_topk_prob", "yes") for config in (QWEN, DEEPSEEK, NEXT)),
    *((config, "num_experts_per_tok", 0) for config in (QWEN, DEEPSEEK, NEXT)),
    *((config, "num_experts_per_tok", 600) for config in (QWEN, DEEPSEEK, NEXT)),
    *((config, "moe_intermediate_size", None) for config in (QWEN, DEEPSEEK, NEXT)),
    *((config, "attention_bias", 1) for config in (QWEN, DEEPSEEK, NEXT)),
    (QWEN, "quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    (QWEN, "layer_types", ["sliding_attention"] * 48),
    (QWEN, "mlp_only_layers", [48]),
    (QWEN, "decoder_sparse_step", 0),
    (QWEN, "partial_rotary_factor", 0.5),
    (QWEN, "num_experts", -1),
    (DEEPSEEK, "moe_layer_freq", 2),
    (DEEPSEEK, "scoring_func", "softmax"),
    (DEEPSEEK, "topk_method", "group_limited_greedy"),
    (DEEPSEEK, "num_key_value_heads", 64),
    (DEEPSEEK, "rope_interleave", "no"),
    (DEEPSEEK, "qk_rope_head_dim", 63),
    (DEEPSEEK, "n_group", 7),
    (DEEPSEEK, "n_group", 256),
    (DEEPSEEK, "topk_group", 9),
    (DEEPSEEK, "num_experts_per_tok", 129),
    (DEEPSEEK, "routed_scaling_factor", 0),
    (DEEPSEEK, "routed_scaling_factor", float("nan")),
    (DEEPSEEK, "n_shared_experts", -1),
    (DEEPSEEK, "num_nextn_predict_layers", True),
    (DEEPSEEK, "q_lora_rank", 0),
    (DEEPSEEK, "kv_lora_rank", None),
    (DEEPSEEK, "partial_rotary_factor", 0.5),
    (NEXT, "attn_output_gate", False),
    (NEXT, "linear_num_value_heads", 24),
    (NEXT, "linear_conv_kernel_dim", 0),
    (NEXT, "layer_types", ["linear_attention"] * 47),
    (NEXT, "layer_types", ["sliding_attention"] * 48),
    (NEXT, "partial_rotary_factor", 0),
    (NEXT, "partial_rotary_factor", 1.5),
    (NEXT, "full_attention_interval", "4"),
    (NEXT, "shared_expert_intermediate_size", 0),
]


@pytest.mark.parametrize(
    ("config", "key", "value"),
    REFUSED,
    ids=[f"{config['model_type']}-{key}-{value!r}"[:60] for config, key, value in REFUSED],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(config: Any, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_of(config, **{key: value})
    assert key in f"{caught.value.what} {caught.value.why}" or key == "qk_rope_head_dim"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method"),
        ({"fmt": "e5m2"}, "quantization_config.fmt"),
        ({"weight_block_size": [64, 128]}, "quantization_config.weight_block_size"),
        ({"weight_block_size": None}, "quantization_config.weight_block_size"),
    ],
)
def test_only_float8_in_128_blocks_is_dequantised(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        arch_of(DEEPSEEK, quantization_config=DEEPSEEK["quantization_config"] | changes)


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        (YARN, (0.1 * math.log(40) + 1) ** 2),
        ({**YARN, "mscale_all_dim": 0.707}, (0.1 * 0.707 * math.log(40) + 1) ** 2),
        ({key: value for key, value in YARN.items() if key != "mscale_all_dim"}, 1.0),
        ({**YARN, "mscale_all_dim": 0}, 1.0),
        ({**YARN, "factor": 1.0}, 1.0),
        (None, 1.0),
    ],
)
@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_yarn_scales_the_scores_as_transformers_does(scaling: Any, wanted: float, form: str) -> None:
    import torch
    import transformers

    small = {
        "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 16,
        "vocab_size": 16, "quantization_config": None,
    }  # fmt: skip
    config = {key: value for key, value in DEEPSEEK.items() if key != "rope_scaling"} | small
    if form == "rope_parameters":
        given = scaling or {"rope_type": "default"}
        config[form] = {"rope_theta": 10000.0, "rope_type": given.get("type", "default"), **given}
    else:
        config[form] = scaling
    mixer = arch_of(config).layers[0].mixer
    assert mixer.scale == pytest.approx(192**-0.5 * wanted, rel=1e-12)
    with torch.device("meta"):
        theirs = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config))
    assert mixer.scale == pytest.approx(theirs.model.layers[0].self_attn.scaling, rel=1e-12)


def test_experts_of_qwen_layers_by_step_and_exception() -> None:
    layers = arch_of(QWEN, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]).layers
    assert [isinstance(layer.ffn, MoE) for layer in layers] == [False, True, False, False, False, True]
    assert all(isinstance(layer.ffn, DenseMLP) for layer in arch_of(QWEN, num_experts=0).layers)
    mixed = arch_of(NEXT, num_hidden_layers=6, decoder_sparse_step=1, mlp_only_layers=[0]).layers
    assert [isinstance(layer.ffn, MoE) for layer in mixed] == [False] + [True] * 5


def test_number_of_experts_under_the_name_of_transformers_5() -> None:
    renamed = {key: value for key, value in QWEN.items() if key != "num_experts"}
    assert arch_of(renamed, num_local_experts=128).layers == arch_of(QWEN).layers


def test_a_window_of_qwen3_moe_holds_for_all_layers() -> None:
    on = arch_of(QWEN, use_sliding_window=True, sliding_window=7, max_window_layers=40)
    assert {layer.mixer.window for layer in on.layers} == {7}
    assert {layer.mixer.window for layer in arch_of(QWEN, sliding_window=7).layers} == {None}


def test_layer_types_of_qwen3_next() -> None:
    kinds = ["full_attention", "linear_attention", "linear_attention"]
    layers = arch_of(NEXT, num_hidden_layers=3, layer_types=kinds).layers
    assert [type(layer.mixer) for layer in layers] == [Attention, GatedDelta, GatedDelta]
    layers = arch_of(NEXT, num_hidden_layers=4, full_attention_interval=2).layers
    assert [type(layer.mixer) for layer in layers] == [GatedDelta, Attention] * 2


def test_partial_rotary_of_qwen3_next_in_both_forms() -> None:
    def rotary(**changes: Any) -> int:
        return int(arch_of(NEXT, **changes).layers[3].mixer.rope.rotary_dim)

    assert rotary(partial_rotary_factor=0.5) == 128
    assert rotary(partial_rotary_factor=None) == 64
    given = {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.125}
    assert rotary(partial_rotary_factor=None, rope_parameters=given) == 32


def test_shared_experts_may_be_absent() -> None:
    assert arch_of(MOON, n_shared_experts=None).layers[1].ffn.shared_intermediate_size == 0


def test_mtp_is_read_and_can_be_none() -> None:
    assert arch_of(DEEPSEEK, num_nextn_predict_layers=0).mtp is None
    assert arch_of(DEEPSEEK, num_nextn_predict_layers=2).mtp.num_layers == 2
    renamed = {key: value for key, value in DEEPSEEK.items() if key != "num_nextn_predict_layers"}
    assert arch_of(renamed, num_mtp_layers=3).mtp.num_layers == 3
    kept = FAMILIES["DeepseekV3ForCausalLM"].weights(arch_of(DEEPSEEK, num_nextn_predict_layers=2)).kept
    assert "model.layers.62.eh_proj.weight" in kept and len(kept) == 2 * 788


@pytest.mark.parametrize("config", [QWEN, DEEPSEEK, MOON, NEXT], ids=lambda config: config["model_type"])
def test_recipe_of_a_mixture_holds_the_router_still(config: dict[str, Any]) -> None:
    family = FAMILIES[config["architectures"][0]]
    recipe = family.recipe(family.arch(config), CPU, 1)
    for key, advice in recipe.items():
        annotation_at(tuple(key.split(".")))
        assert advice.why and "\n" not in advice.why, key
    values = {key: advice.value for key, advice in recipe.items()}
    assert (values["algo.mini_batches"], values["algo.epochs"], values["train.mtp"]) == (1, 1, "off")
    assert values["train.router_dtype"] == ("float64" if config is NEXT else "float32")
    assert (values["rollout.temperature"], values["rollout.top_k"], values["rollout.top_p"]) == (1.0, 0, 1.0)
    assert Config.model_fields["train"].annotation.model_validate({"lr": values["train.lr"]})


def test_learning_rate_falls_with_the_size_of_the_model() -> None:
    def lr(config: dict[str, Any]) -> tuple[float, str]:
        family = FAMILIES[config["architectures"][0]]
        advice = family.recipe(family.arch(config), CPU, 1)["train.lr"]
        return advice.value, advice.why

    assert lr(MOON)[0] == 2e-6 and "16.0 billion" in lr(MOON)[1]
    assert lr(DEEPSEEK)[0] == 7e-7 and "671.0 billion" in lr(DEEPSEEK)[1]
    assert lr(QWEN)[0] == lr(NEXT)[0] == 2e-6


def test_router_of_qwen3_next_is_float32_with_the_reason_where_float64_is_absent() -> None:
    family = FAMILIES["Qwen3NextForCausalLM"]
    advice = family.recipe(family.arch(NEXT), NARROW, 1)["train.router_dtype"]
    assert advice.value == "float32" and "Acme One does not have it" in advice.why


def test_plugin_names_and_thinking_switches() -> None:
    assert [family.name for family in grpo_models()] == [
        "llama", "qwen2_5", "qwen3", "qwen3_moe", "deepseek_v3", "qwen3_next",
    ]  # fmt: skip
    switches = {family.name: family.chat().thinking for family in grpo_models()}
    assert switches["qwen3"] == switches["qwen3_moe"] == "enable_thinking"
    assert switches["deepseek_v3"] == "thinking" and switches["qwen2_5"] is None
    assert "<|im_end|>" in FAMILIES["DeepseekV3ForCausalLM"].chat().stop_tokens
