"""Qwen3 with experts (30B-A3B, 235B-A22B): the attention of Qwen3, softmax routing, no shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_core.model.arch import Arch, Attention, DenseMLP, Layer, MoE
from grpo_core.model.hf_config import (
    check_arch,
    count,
    expect,
    expect_common,
    flag,
    read_rope,
    read_top,
    size,
    sparse_layers,
)  # fmt: skip
from grpo_core.model.plugin import ChatSpec

from .recipes import qwen_moe_recipe

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.plugin import Advice
    from grpo_core.model.weights import WeightMap


class Qwen3Moe:
    """`Qwen3MoeForCausalLM`."""

    name = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        """A window, where one is switched on, holds for every layer: `max_window_layers` has no effect."""
        expect_common(hf_config)
        for kind in hf_config.get("layer_types") or ():
            expect({"layer_types": kind}, "layer_types", ("full_attention",), "all layers are alike here")
        mixer = _mixer(hf_config)
        experts = count(hf_config, "num_experts", count(hf_config, "num_local_experts", 0))
        sparse = [bool(experts) and on for on in sparse_layers(hf_config)]
        layers = tuple(
            Layer(mixer=mixer, ffn=_experts(hf_config, experts) if on else _dense(hf_config)) for on in sparse
        )
        return check_arch(Arch(family=self.name, layers=layers, **read_top(hf_config)))

    def weights(self, arch: Arch) -> WeightMap:
        from grpo_core.model.weight_rules import decoder_weight_map

        return decoder_weight_map(arch)

    def chat(self) -> ChatSpec:
        return ChatSpec(stop_tokens=("<|im_end|>", "<|endoftext|>"), thinking="enable_thinking")

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        return qwen_moe_recipe(arch)


def _mixer(config: Mapping[str, Any]) -> Attention:
    heads = size(config, "num_attention_heads")
    head_dim = size(config, "head_dim", size(config, "hidden_size") // heads)
    bias = flag(config, "attention_bias", False)
    return Attention(
        num_attention_heads=heads,
        num_key_value_heads=size(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        rope=read_rope(config, head_dim=head_dim),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        window=size(config, "sliding_window", 4096) if flag(config, "use_sliding_window", False) else None,
    )


def _dense(config: Mapping[str, Any]) -> DenseMLP:
    return DenseMLP(intermediate_size=size(config, "intermediate_size"))


def _experts(config: Mapping[str, Any], experts: int) -> MoE:
    return MoE(
        num_experts=experts,
        top_k=size(config, "num_experts_per_tok"),
        intermediate_size=size(config, "moe_intermediate_size"),
        score="softmax",
        norm_topk_prob=flag(config, "norm_topk_prob", False),
    )
