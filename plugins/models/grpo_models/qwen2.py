"""Qwen2 and Qwen2.5 (dense): biases on queries, keys and values; a window on the later layers where set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_core.model.hf_config import layer_windows

from .dense import RECIPE, dense_arch, divided_head_dim

if TYPE_CHECKING:
    from grpo_core.model.arch import Arch
    from grpo_core.model.weights import WeightMap


class Qwen2:
    """`Qwen2ForCausalLM`."""

    name = "qwen2"
    architectures = ("Qwen2ForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        return dense_arch(
            self.name, hf_config, head_dim=divided_head_dim(hf_config), qkv_bias=True, out_bias=False,
            mlp_bias=False, qk_norm=False, windows=layer_windows(hf_config),
        )  # fmt: skip

    def weights(self, arch: Arch) -> WeightMap:
        from grpo_core.model.weights import dense_weight_map

        return dense_weight_map(arch)

    def stop_tokens(self) -> tuple[str, ...]:
        return ("<|im_end|>", "<|endoftext|>")

    def recipe(self, device: str, world: int) -> Mapping[str, Any]:
        return RECIPE
