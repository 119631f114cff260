"""Qwen3-Next: three gated delta layers to one of gated attention, many small experts, zero-centred norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from grpo_core.model.arch import MTP, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE
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
    unsupported,
)  # fmt: skip
from grpo_core.model.plugin import ChatSpec

from .recipes import qwen_next_recipe

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.plugin import Advice
    from grpo_core.model.weights import WeightMap

KINDS = ("linear_attention", "full_attention")


class Qwen3Next:
    """`Qwen3NextForCausalLM`."""

    name = "qwen3_next"
    architectures = ("Qwen3NextForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        """`layer_types` names the mixers; without it every `full_attention_interval`-th has attention."""
        expect_common(hf_config)
        expect(hf_config, "attn_output_gate", (True,), "attention is gated in this family")
        attention, delta = _attention(hf_config), _gated_delta(hf_config)
        experts = count(hf_config, "num_experts", count(hf_config, "num_local_experts", 0))
        sparse = [bool(experts) and on for on in sparse_layers(hf_config)]
        moe = _experts(hf_config, experts) if experts else _dense(hf_config)
        layers = tuple(
            Layer(
                mixer=attention if kind == "full_attention" else delta, ffn=moe if on else _dense(hf_config)
            )
            for kind, on in zip(_kinds(hf_config), sparse, strict=True)
        )
        extra = count(hf_config, "num_nextn_predict_layers", 1)
        return check_arch(
            Arch(
                family=self.name,
                layers=layers,
                zero_centered_norm=True,
                mtp=MTP(num_layers=extra, layer=Layer(mixer=attention, ffn=moe)) if extra else None,
                **read_top(hf_config),
            )
        )

    def weights(self, arch: Arch) -> WeightMap:
        """Names under `mtp.` are kept: layers that predict further tokens."""
        from grpo_core.model.weight_rules import checkpoint_shapes, decoder_weight_map, layer_rules

        table, hidden = decoder_weight_map(arch), arch.hidden_size
        if arch.mtp is None:
            return table
        names = ("mtp.norm", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden")
        kept: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in names}
        kept["mtp.fc.weight"] = (hidden, 2 * hidden)
        for index in range(arch.mtp.num_layers):
            hf = f"mtp.layers.{index}."
            rules = layer_rules(arch.mtp.layer, hidden, own=hf, hf=hf, shared="shared_expert")
            kept |= checkpoint_shapes(rules)
        return replace(table, kept=MappingProxyType(kept))

    def chat(self) -> ChatSpec:
        return ChatSpec(stop_tokens=("<|im_end|>", "<|endoftext|>"), thinking="enable_thinking")

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        return qwen_next_recipe(device)


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    layers = size(config, "num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        every = size(config, "full_attention_interval", 4)
        return tuple(KINDS[(index + 1) % every == 0] for index in range(layers))
    if len(kinds) != layers:
        raise unsupported(
            "layer_types", f"{len(kinds)} entries", f"num_hidden_layers is {layers}",
            "mend config.json: one entry for each layer",
        )  # fmt: skip
    for kind in kinds:
        expect({"layer_types": kind}, "layer_types", KINDS, "the family has these two kinds of layers")
    return tuple(kinds)


def _attention(config: Mapping[str, Any]) -> Attention:
    heads, head_dim = size(config, "num_attention_heads"), size(config, "head_dim", 256)
    bias = flag(config, "attention_bias", False)
    return Attention(
        num_attention_heads=heads,
        num_key_value_heads=size(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        rope=read_rope(config, head_dim=head_dim, partial=0.25),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        output_gate=True,
    )


def _gated_delta(config: Mapping[str, Any]) -> GatedDelta:
    return GatedDelta(
        num_key_heads=size(config, "linear_num_key_heads"),
        num_value_heads=size(config, "linear_num_value_heads"),
        key_head_dim=size(config, "linear_key_head_dim"),
        value_head_dim=size(config, "linear_value_head_dim"),
        conv_kernel=size(config, "linear_conv_kernel_dim", 4),
    )


def _dense(config: Mapping[str, Any]) -> DenseMLP:
    return DenseMLP(intermediate_size=size(config, "intermediate_size"))


def _experts(config: Mapping[str, Any], experts: int) -> MoE:
    return MoE(
        num_experts=experts,
        top_k=size(config, "num_experts_per_tok"),
        intermediate_size=size(config, "moe_intermediate_size"),
        score="softmax",
        norm_topk_prob=flag(config, "norm_topk_prob", True),
        shared_intermediate_size=size(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
