"""Qwen2 and Qwen2.5 (dense): biases on queries, keys and values; a window on the later layers where set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_core.model.hf_config import layer_windows
from grpo_core.model.plugin import ChatSpec

from .dense import dense_arch, divided_head_dim
from .recipes import dense_recipe

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.arch import Arch
    from grpo_core.model.plugin import Advice
    from grpo_core.model.weights import WeightMap


class Qwen2:
    """`Qwen2ForCausalLM`: Qwen2 and Qwen2.5 differ in their tokens and training only."""

    name = "qwen2_5"
    architectures = ("Qwen2ForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        return dense_arch(
            self.name, hf_config, head_dim=divided_head_dim(hf_config), qkv_bias=True, out_bias=False,
            mlp_bias=False, qk_norm=False, windows=layer_windows(hf_config),
        )  # fmt: skip

    def weights(self, arch: Arch) -> WeightMap:
        from grpo_core.model.weight_rules import decoder_weight_map

        return decoder_weight_map(arch)

    def chat(self) -> ChatSpec:
        return ChatSpec(stop_tokens=("<|im_end|>", "<|endoftext|>"))

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        return dense_recipe()
