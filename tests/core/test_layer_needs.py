"""Needs of each kind of mixer and feed-forward: the ops that it has, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grpo_core.impl import Need
from grpo_core.model.arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE, Rope
from grpo_core.needs import RunFacts, needs_of

FACTS = RunFacts(train_dtype="bfloat16", rollout_dtype="float32")
ROPE = Rope(theta=1e4, rotary_dim=8, interleaved=True)
GQA = Attention(
    num_attention_heads=8, num_key_value_heads=2, head_dim=32, rope=ROPE, qk_norm=True, output_gate=True
)
LATENT = MLA(
    num_attention_heads=4, q_lora_rank=48, kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=12, rope=ROPE, scale=0.2,
)  # fmt: skip
DELTA = GatedDelta(num_key_heads=2, num_value_heads=6, key_head_dim=10, value_head_dim=14, conv_kernel=4)
EXPERTS = MoE(
    num_experts=16, top_k=4, intermediate_size=24, score="sigmoid", norm_topk_prob=True, num_groups=4,
    topk_groups=2, shared_intermediate_size=36,
)  # fmt: skip
DENSE = DenseMLP(intermediate_size=96)


def arch(*layers: Layer, zero_centered: bool = False) -> Arch:
    return Arch(
        family="test", vocab_size=100, hidden_size=64, layers=layers, rms_norm_eps=1e-6,
        tie_word_embeddings=True, max_position_embeddings=128, zero_centered_norm=zero_centered,
    )  # fmt: skip


def needs(*layers: Layer, facts: RunFacts = FACTS, zero_centered: bool = False) -> dict[str, list[Need]]:
    found: dict[str, list[Need]] = {}
    for need in needs_of(arch(*layers, zero_centered=zero_centered), facts):
        found.setdefault(need.op, []).append(need)
    return found


def namespaces(*layers: Layer) -> set[str]:
    return {op.partition(".")[0] for op in needs(*layers)}


def test_a_model_needs_the_ops_of_its_layers_and_no_others() -> None:
    kinds = {"attention", "mla", "gated_delta", "short_conv", "moe", "rope", "mlp"}
    assert namespaces(Layer(mixer=LATENT, ffn=DENSE)) & kinds == {"mla", "rope", "mlp"}
    assert namespaces(Layer(mixer=GQA, ffn=DENSE)) & kinds == {"attention", "rope", "mlp"}
    mixed = (Layer(mixer=DELTA, ffn=EXPERTS), Layer(mixer=GQA, ffn=EXPERTS))
    assert namespaces(*mixed) & kinds == kinds - {"mla"}
    alone = replace(EXPERTS, shared_intermediate_size=0)
    assert "mlp.swiglu" not in needs(Layer(mixer=GQA, ffn=alone))


def test_the_facts_of_latent_attention() -> None:
    found = needs(Layer(mixer=LATENT, ffn=DENSE))
    heads = {
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "kv_lora_rank": 40,
        "num_attention_heads": 4,
    }  # fmt: skip
    assert found["mla.varlen"] == [
        Need(
            op="mla.varlen", facts={"dtype": "bfloat16", **heads, "shared_prefix": True}, backward=True
        ),
        Need(op="mla.varlen", facts={"dtype": "float32", **heads, "shared_prefix": False}),
    ]  # fmt: skip
    for op in ("mla.cache", "mla.prefill", "mla.decode"):
        assert found[op] == [Need(op=op, facts={"dtype": "float32", **heads})]
    assert {need.facts["hidden_size"] for need in found["norm.rms"]} == {64, 40, 48}
    assert found["rope.apply"][0].facts["head_dim"] == 8
    alone = needs(Layer(mixer=LATENT, ffn=DENSE), facts=replace(FACTS, share_prompt=False))
    assert alone["mla.varlen"][0].facts["shared_prefix"] is False


def test_the_facts_of_the_gated_delta_net() -> None:
    found = needs(Layer(mixer=DELTA, ffn=DENSE), Layer(mixer=GQA, ffn=DENSE), zero_centered=True)
    heads = {"key_head_dim": 10, "value_head_dim": 14, "num_value_groups": 3}
    assert found["gated_delta.chunk"] == [
        Need(op="gated_delta.chunk", facts={"dtype": "bfloat16", **heads}, backward=True),
        Need(op="gated_delta.chunk", facts={"dtype": "float32", **heads}),
    ]
    assert found["gated_delta.step"] == [Need(op="gated_delta.step", facts={"dtype": "float32", **heads})]
    assert found["short_conv.step"] == [
        Need(op="short_conv.step", facts={"dtype": "float32", "conv_kernel": 4})
    ]
    norms = {(need.facts["hidden_size"], need.facts["zero_centered"]) for need in found["norm.rms"]}
    assert norms == {(64, True), (14, False), (32, True)}


def test_a_fused_step_that_knows_no_zero_centred_norm_is_not_asked_for_one() -> None:
    layer = Layer(mixer=GQA, ffn=DENSE)
    assert "attention.step" in needs(layer)
    assert "attention.step" not in needs(layer, zero_centered=True)
    plain = Layer(mixer=replace(GQA, qk_norm=False), ffn=DENSE)
    assert "attention.step" in needs(plain, zero_centered=True)


def test_a_model_without_attention_still_has_a_cache_to_count_its_sequences() -> None:
    found = needs(Layer(mixer=DELTA, ffn=DENSE))
    assert [op for op in found if op.startswith(("attention.", "mla."))] == ["attention.cache"]
    [cache] = found["attention.cache"]
    assert cache.facts["dtype"] == "float32"
    assert cache.required
    assert "rope.apply" not in found


@pytest.mark.parametrize("part", ["route", "dispatch", "experts", "combine"])
def test_the_facts_of_a_mixture(part: str) -> None:
    found = needs(Layer(mixer=GQA, ffn=EXPERTS), facts=replace(FACTS, router_dtype="float64"))
    sizes = {
        "num_experts": 16, "top_k": 4, "score": "sigmoid", "num_groups": 4, "hidden_size": 64,
        "intermediate_size": 24, "router_dtype": "float64", "expert_parallel": 1,
    }  # fmt: skip
    assert found[f"moe.{part}"] == [
        Need(op=f"moe.{part}", facts={"dtype": "bfloat16", **sizes}, backward=True),
        Need(op=f"moe.{part}", facts={"dtype": "float32", **sizes}),
    ]
    assert all(not need.required for need in found["moe.layer"])
    assert {need.facts["intermediate_size"] for need in found["mlp.swiglu"]} == {36}


def test_training_linears_are_asked_for_with_their_gradient() -> None:
    assert needs(Layer(mixer=GQA, ffn=DENSE))["linear.dense"] == [
        Need(op="linear.dense", facts={"dtype": "bfloat16"}, backward=True)
    ]
