"""Llama 2 and 3, and the models that keep their architecture: SmolLM2, TinyLlama, Yi, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_core.model.hf_config import size
from grpo_core.model.plugin import ChatSpec

from .dense import dense_arch, divided_head_dim
from .recipes import dense_recipe

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.arch import Arch
    from grpo_core.model.plugin import Advice
    from grpo_core.model.weights import WeightMap


class Llama:
    """`LlamaForCausalLM`."""

    name = "llama"
    architectures = ("LlamaForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        """Biases of attention and feed-forward as `attention_bias` and `mlp_bias` say."""
        attention_bias = bool(hf_config.get("attention_bias", False))
        return dense_arch(
            self.name, hf_config, head_dim=divided_head_dim(hf_config), qkv_bias=attention_bias,
            out_bias=attention_bias, mlp_bias=bool(hf_config.get("mlp_bias", False)), qk_norm=False,
            windows=[None] * size(hf_config, "num_hidden_layers"),
        )  # fmt: skip

    def weights(self, arch: Arch) -> WeightMap:
        from grpo_core.model.weight_rules import decoder_weight_map

        return decoder_weight_map(arch)

    def chat(self) -> ChatSpec:
        return ChatSpec(stop_tokens=("<|eot_id|>", "<|eom_id|>", "<|im_end|>"))

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        return dense_recipe()
