"""Every bundled family passes the model checks, and each check fails for the mistake that it is there for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

from grpo_conformance.model_case import (
    MODEL_CHECKS,
    ModelCase,
    check_bad_configs,
    check_claims,
    check_gradients,
    check_logits,
    check_model_plugin,
    check_names,
    check_refusals,
    check_round_trip,
)
from grpo_conformance.model_parts import randomise
from grpo_core.errors import CheckpointError
from grpo_core.plugins import load

SMALL: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3-moe": ("Qwen3Moe", {**MOE, "head_dim": 10, "norm_topk_prob": True}),
    "moonlight": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 1,
            "topk_group": 1, "n_shared_experts": 2, "q_lora_rank": None, "kv_lora_rank": 14,
            "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12, "first_k_dense_replace": 1,
            "num_key_value_heads": 4, "head_dim": 6,
        },
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3,
            "topk_group": 2, "n_shared_experts": 1, "q_lora_rank": 18, "kv_lora_rank": 14,
            "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 12, "first_k_dense_replace": 1,
            "num_key_value_heads": 4, "head_dim": 6,
        },
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **MOE, "head_dim": 16, "shared_expert_intermediate_size": 14, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}  # fmt: skip


def make_case(name: str) -> ModelCase:
    import transformers

    kind, settings = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings})
    torch.manual_seed(0)
    theirs = randomise(getattr(transformers, f"{kind}ForCausalLM")(config).float().eval())
    hf_config = {**theirs.config.to_dict(), "architectures": [f"{kind}ForCausalLM"]}
    family = load().model_plugin_for(hf_config["architectures"])
    return ModelCase(family=family, hf_config=hf_config, hf_model=theirs)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_bundled_family_conforms(name: str, check: Any) -> None:
    check(make_case(name))


class Changed:
    """A family with one thing changed."""

    def __init__(self, inner: Any, **changes: Any) -> None:
        self._inner, self._changes = inner, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes[name] if name in self._changes else getattr(self._inner, name)


def wrong(**changes: Any) -> ModelCase:
    case = make_case("qwen2")
    return dataclasses.replace(case, family=Changed(case.family, **changes))


def arch_with(**fields: Any) -> Any:
    inner = make_case("qwen2").family
    return lambda config: dataclasses.replace(inner.arch(config), **fields)


def test_another_epsilon_is_seen_in_logits_and_gradients() -> None:
    case = wrong(arch=arch_with(rms_norm_eps=0.05))
    with pytest.raises(AssertionError, match="logits are off by"):
        check_logits(case)
    with pytest.raises(AssertionError, match="gradients are off"):
        check_gradients(case)


def test_an_architecture_that_is_not_claimed_is_seen() -> None:
    with pytest.raises(AssertionError, match="the family claims"):
        check_claims(wrong(architectures=("OtherForCausalLM",)))


def test_a_recipe_with_a_setting_that_does_not_exist_is_seen() -> None:
    with pytest.raises(AssertionError, match=r"train\.speed"):
        check_claims(wrong(recipe=lambda *args: {"train.speed": 11}))


def changed_map(**fields: Any) -> Any:
    inner = make_case("qwen2").family
    return lambda arch: dataclasses.replace(inner.weights(arch), **fields)


def test_a_map_without_a_tensor_is_seen() -> None:
    family = make_case("qwen2").family
    rules = family.weights(family.arch(make_case("qwen2").hf_config)).rules
    case = wrong(weights=changed_map(rules=rules[:-1]))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        check_names(case)
    with pytest.raises(AssertionError, match=r"check_names: .*1 name\n.*lm_head\.weight"):
        check_model_plugin(case.family, case.hf_config, case.hf_model)


class Lenient:
    """A map that takes whatever comes, or exports something else."""

    def __init__(self, inner: Any, **methods: Any) -> None:
        self._inner, self._methods = inner, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods[name] if name in self._methods else getattr(self._inner, name)


def test_a_map_that_refuses_nothing_is_seen() -> None:
    inner = make_case("qwen2").family
    family = {"weights": lambda arch: Lenient(inner.weights(arch), check=lambda shapes: list(shapes))}
    with pytest.raises(AssertionError, match="is missing is not refused"):
        check_refusals(wrong(**family))


def test_an_export_that_changes_a_weight_is_seen() -> None:
    inner = make_case("qwen2").family

    def export(table: Any, neutral: Mapping[str, torch.Tensor]) -> Any:
        return ((name, value * 2 if name == "model.norm.weight" else value)
                for name, value in table.export(neutral))  # fmt: skip

    def weights(arch: Any) -> Any:
        table = inner.weights(arch)
        return Lenient(table, export=lambda neutral: export(table, neutral))

    with pytest.raises(AssertionError, match=r"values differ: model\.norm\.weight"):
        check_round_trip(wrong(weights=weights))


def test_a_family_that_takes_any_config_is_seen() -> None:
    inner = make_case("qwen2").family
    good = inner.arch(make_case("qwen2").hf_config)
    with pytest.raises(AssertionError, match="is not refused"):
        check_bad_configs(wrong(arch=lambda config: good))


def test_all_failures_are_told_at_once() -> None:
    case = make_case("qwen2")
    family = Changed(case.family, arch=arch_with(rms_norm_eps=0.05), architectures=("OtherForCausalLM",))
    with pytest.raises(AssertionError) as caught:
        check_model_plugin(family, MappingProxyType(dict(case.hf_config)), case.hf_model)
    told = str(caught.value)
    assert "check_claims" in told and "check_logits" in told and "check_refusals" not in told
