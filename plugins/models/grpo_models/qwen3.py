"""Qwen3 (dense): norms on the heads of queries and keys, head_dim independent of the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_core.model.hf_config import layer_windows, size
from grpo_core.model.plugin import ChatSpec

from .dense import dense_arch
from .recipes import dense_recipe

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.arch import Arch
    from grpo_core.model.plugin import Advice
    from grpo_core.model.weights import WeightMap


class Qwen3:
    """`Qwen3ForCausalLM`."""

    name = "qwen3"
    architectures = ("Qwen3ForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        """A head has 128 dimensions where config.json does not say, as in transformers."""
        bias = bool(hf_config.get("attention_bias", False))
        return dense_arch(
            self.name, hf_config, head_dim=size(hf_config, "head_dim", 128), qkv_bias=bias, out_bias=bias,
            mlp_bias=False, qk_norm=True, windows=layer_windows(hf_config),
        )  # fmt: skip

    def weights(self, arch: Arch) -> WeightMap:
        from grpo_core.model.weight_rules import decoder_weight_map

        return decoder_weight_map(arch)

    def chat(self) -> ChatSpec:
        return ChatSpec(stop_tokens=("<|im_end|>", "<|endoftext|>"), thinking="enable_thinking")

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        return dense_recipe()
