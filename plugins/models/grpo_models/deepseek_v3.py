"""DeepSeek-V3 and R1, and Moonlight, which keeps their architecture without query compression and yarn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from grpo_core.model.arch import MLA, MTP, Arch, DenseMLP, Layer, MoE, Rope
from grpo_core.model.hf_config import (
    check_arch,
    count,
    expect,
    expect_common,
    expect_fp8_blocks,
    flag,
    positive,
    read_rope,
    read_top,
    size,
)  # fmt: skip
from grpo_core.model.plugin import ChatSpec

from .recipes import deepseek_recipe

if TYPE_CHECKING:
    from grpo_core.impl import DeviceInfo
    from grpo_core.model.plugin import Advice
    from grpo_core.model.weights import WeightMap

SHARED = "shared_experts"


class DeepseekV3:
    """`DeepseekV3ForCausalLM`."""

    name = "deepseek_v3"
    architectures = ("DeepseekV3ForCausalLM",)

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        """The first `first_k_dense_replace` layers are dense, the others have experts."""
        expect_common(hf_config, quantised=True)
        expect_fp8_blocks(hf_config)
        expect(hf_config, "moe_layer_freq", (1,), "every layer after the dense ones has experts")
        expect(hf_config, "scoring_func", ("sigmoid",), "the router scores experts so in this family")
        expect(hf_config, "topk_method", ("noaux_tc",), "experts are chosen with a selection bias")
        mixer = _mixer(hf_config)
        sparse = Layer(mixer=mixer, ffn=_experts(hf_config))
        dense = Layer(mixer=mixer, ffn=DenseMLP(intermediate_size=size(hf_config, "intermediate_size")))
        first = count(hf_config, "first_k_dense_replace", 3)
        extra = count(hf_config, "num_nextn_predict_layers", count(hf_config, "num_mtp_layers", 0))
        return check_arch(
            Arch(
                family=self.name,
                layers=tuple(
                    sparse if index >= first else dense
                    for index in range(size(hf_config, "num_hidden_layers"))
                ),
                mtp=MTP(num_layers=extra, layer=sparse) if extra else None,
                **read_top(hf_config),
            )
        )

    def weights(self, arch: Arch) -> WeightMap:
        """Layers beyond the last are kept: each predicts one token further, with a copy of the embedding."""
        from grpo_core.model.weight_rules import checkpoint_shapes, decoder_weight_map, layer_rules

        table = decoder_weight_map(arch, shared=SHARED)
        kept: dict[str, tuple[int, ...]] = {}
        copies: dict[str, str] = {}
        hidden, vocab, first = arch.hidden_size, arch.vocab_size, len(arch.layers)
        for index in range(first, first + (arch.mtp.num_layers if arch.mtp else 0)):
            hf = f"model.layers.{index}."
            kept |= checkpoint_shapes(layer_rules(arch.mtp.layer, hidden, own=hf, hf=hf, shared=SHARED))
            kept |= {f"{hf}{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
            kept[f"{hf}eh_proj.weight"] = (hidden, 2 * hidden)
            for name, source in (
                ("embed_tokens.weight", "model.embed_tokens.weight"),
                ("shared_head.head.weight", table.tied.get("lm_head.weight", "lm_head.weight")),
            ):
                kept[hf + name], copies[hf + name] = (vocab, hidden), source
        return replace(table, kept=MappingProxyType(kept), kept_copies=MappingProxyType(copies))

    def chat(self) -> ChatSpec:
        return ChatSpec(
            stop_tokens=("<|im_end|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"), thinking="thinking"
        )

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        return deepseek_recipe(arch)


def _mixer(config: Mapping[str, Any]) -> MLA:
    heads = size(config, "num_attention_heads")
    expect(config, "num_key_value_heads", (heads,), "every head has keys and values of its own in MLA")
    nope, rotary = size(config, "qk_nope_head_dim"), size(config, "qk_rope_head_dim")
    rope = read_rope(config, head_dim=rotary, interleaved=flag(config, "rope_interleave", True))
    return MLA(
        num_attention_heads=heads,
        q_lora_rank=None if config.get("q_lora_rank") is None else size(config, "q_lora_rank"),
        kv_lora_rank=size(config, "kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rotary,
        v_head_dim=size(config, "v_head_dim"),
        rope=rope,
        scale=(nope + rotary) ** -0.5 * _mscale(rope) ** 2,
        bias=flag(config, "attention_bias", False),
    )


def _mscale(rope: Rope) -> float:
    """What yarn multiplies queries and keys by (DeepSeek-V2, section 3.1.4); 1 without scaling."""
    weight, factor = rope.scaling.get("mscale_all_dim"), rope.scaling.get("factor") or 1.0
    if rope.scaling["rope_type"] == "default" or not weight or factor <= 1:
        return 1.0
    return 0.1 * float(weight) * math.log(factor) + 1.0


def _experts(config: Mapping[str, Any]) -> MoE:
    inner = size(config, "moe_intermediate_size")
    return MoE(
        num_experts=size(config, "n_routed_experts", config.get("num_local_experts")),
        top_k=size(config, "num_experts_per_tok"),
        intermediate_size=inner,
        score="sigmoid",
        norm_topk_prob=flag(config, "norm_topk_prob", True),
        scale=positive(config, "routed_scaling_factor", 1.0),
        num_groups=size(config, "n_group", 1),
        topk_groups=size(config, "topk_group", 1),
        selection_bias=True,
        shared_intermediate_size=inner * count(config, "n_shared_experts", 0),
    )
