"""Weight maps from an `Arch`, for checkpoints that name their tensors as transformers does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import MappingProxyType

from .arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE
from .weights import Part, Rule, WeightMap


def decoder_weight_map(arch: Arch, *, shared: str = "shared_expert") -> WeightMap:
    """The table of a decoder whose checkpoint has Llama's outer names and transformers' inner ones.

    `shared` is the name of the shared expert in a layer's `mlp` ("shared_experts" in DeepSeek's).
    """
    hidden, vocab = arch.hidden_size, arch.vocab_size
    rules = [rule_of_one("embed.weight", "model.embed_tokens.weight", vocab, hidden)]
    for index, layer in enumerate(arch.layers):
        rules += layer_rules(
            layer, hidden, own=f"layers.{index}.", hf=f"model.layers.{index}.", shared=shared
        )
    rules.append(rule_of_one("norm.weight", "model.norm.weight", hidden))
    if arch.tie_word_embeddings:
        return WeightMap(
            rules=tuple(rules), tied=MappingProxyType({"lm_head.weight": "model.embed_tokens.weight"})
        )
    return WeightMap(rules=(*rules, rule_of_one("lm_head.weight", "lm_head.weight", vocab, hidden)))


def layer_rules(layer: Layer, hidden: int, *, own: str, hf: str, shared: str) -> Iterator[Rule]:
    """Rules of one decoder layer, under the prefixes `own` (neutral) and `hf` (checkpoint)."""
    yield rule_of_one(own + "attn_norm.weight", hf + "input_layernorm.weight", hidden)
    mixer, ffn = layer.mixer, layer.ffn
    if isinstance(mixer, Attention):
        yield from _attention_rules(mixer, hidden, own + "attn.", hf + "self_attn.")
    elif isinstance(mixer, MLA):
        yield from _mla_rules(mixer, hidden, own + "attn.", hf + "self_attn.")
    else:
        yield from _gated_delta_rules(mixer, hidden, own + "linear_attn.", hf + "linear_attn.")
    yield rule_of_one(own + "mlp_norm.weight", hf + "post_attention_layernorm.weight", hidden)
    if isinstance(ffn, DenseMLP):
        yield from _swiglu_rules(own + "mlp.", hf + "mlp.", ffn.intermediate_size, hidden, bias=ffn.bias)
    else:
        yield from _moe_rules(ffn, hidden, own + "mlp.", hf + "mlp.", shared)


def checkpoint_shapes(rules: Iterable[Rule]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor of some rules."""
    return {part.name: rule.hf_shape(part) for rule in rules for part in rule.parts}


def rule_of_one(neutral: str, hf: str, rows: int, *tail: int, float32: bool = False) -> Rule:
    """The rule of a parameter that is one checkpoint tensor."""
    return Rule(
        neutral=neutral, shape=(rows, *tail), tail=tail, float32=float32,
        parts=(Part(name=hf, pieces=((0, rows),)),),
    )  # fmt: skip


def stacked(
    neutral: str, prefix: str, parts: tuple[tuple[str, int], ...], columns: int, *, bias: bool = False
) -> Iterator[Rule]:
    """Rules of one linear layer (weight, and bias where it has one) that stacks several of the checkpoint's.

    `parts` are (name after the prefix, rows) from the first row on.
    """
    for kind, tail in (("weight", (columns,)), ("bias", ())) if bias else (("weight", (columns,)),):
        named, start = [], 0
        for part, rows in parts:
            named.append(Part(name=f"{prefix}{part}.{kind}", pieces=((start, rows),)))
            start += rows
        yield Rule(neutral=f"{neutral}.{kind}", shape=(start, *tail), tail=tail, parts=tuple(named))


def _attention_rules(mixer: Attention, hidden: int, own: str, hf: str) -> Iterator[Rule]:
    heads, dim = mixer.num_attention_heads, mixer.head_dim
    q_rows, kv_rows = heads * dim, mixer.num_key_value_heads * dim
    if mixer.output_gate:
        yield from _gated_qkv_rules(mixer, hidden, own, hf)
    else:
        qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        yield from stacked(own + "qkv", hf, qkv, hidden, bias=mixer.qkv_bias)
    if mixer.qk_norm:
        yield rule_of_one(own + "q_norm.weight", hf + "q_norm.weight", dim)
        yield rule_of_one(own + "k_norm.weight", hf + "k_norm.weight", dim)
    yield from stacked(own + "out", hf, (("o_proj", hidden),), q_rows, bias=mixer.out_bias)


def _gated_qkv_rules(mixer: Attention, hidden: int, own: str, hf: str) -> Iterator[Rule]:
    # q_proj holds each head's query and then its gate; the neutral rows are q, k, v, gate.
    heads, dim = mixer.num_attention_heads, mixer.head_dim
    q_rows, kv_rows = heads * dim, mixer.num_key_value_heads * dim
    total = 2 * q_rows + 2 * kv_rows
    kinds = (("weight", (hidden,)), ("bias", ())) if mixer.qkv_bias else (("weight", (hidden,)),)
    for kind, tail in kinds:
        yield Rule(
            neutral=f"{own}qkv.{kind}",
            shape=(total, *tail),
            tail=tail,
            parts=(
                Part(name=f"{hf}q_proj.{kind}", groups=heads, pieces=((0, q_rows), (total - q_rows, q_rows))),
                Part(name=f"{hf}k_proj.{kind}", pieces=((q_rows, kv_rows),)),
                Part(name=f"{hf}v_proj.{kind}", pieces=((q_rows + kv_rows, kv_rows),)),
            ),
        )


def _mla_rules(mixer: MLA, hidden: int, own: str, hf: str) -> Iterator[Rule]:
    heads, latent = mixer.num_attention_heads, mixer.kv_lora_rank
    q_rows = heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    if mixer.q_lora_rank is None:
        yield rule_of_one(own + "q.weight", hf + "q_proj.weight", q_rows, hidden)
    else:
        rank = mixer.q_lora_rank
        yield from stacked(own + "q_a", hf, (("q_a_proj", rank),), hidden, bias=mixer.bias)
        yield rule_of_one(own + "q_a_norm.weight", hf + "q_a_layernorm.weight", rank)
        yield rule_of_one(own + "q_b.weight", hf + "q_b_proj.weight", q_rows, rank)
    down = (("kv_a_proj_with_mqa", latent + mixer.qk_rope_head_dim),)
    yield from stacked(own + "kv_a", hf, down, hidden, bias=mixer.bias)
    yield rule_of_one(own + "kv_a_norm.weight", hf + "kv_a_layernorm.weight", latent)
    kv_rows = heads * (mixer.qk_nope_head_dim + mixer.v_head_dim)
    yield rule_of_one(own + "kv_b.weight", hf + "kv_b_proj.weight", kv_rows, latent)
    yield from stacked(own + "out", hf, (("o_proj", hidden),), heads * mixer.v_head_dim, bias=mixer.bias)


def _gated_delta_rules(mixer: GatedDelta, hidden: int, own: str, hf: str) -> Iterator[Rule]:
    # Of each key head the checkpoint holds q, k, and then v and z (b and a) of its value heads.
    key_heads, value_heads = mixer.num_key_heads, mixer.num_value_heads
    qk, v = key_heads * mixer.key_head_dim, value_heads * mixer.value_head_dim
    qkvz = Part(
        name=hf + "in_proj_qkvz.weight", groups=key_heads,
        pieces=((0, qk), (qk, qk), (2 * qk, v), (2 * qk + v, v)),
    )  # fmt: skip
    ba = Part(
        name=hf + "in_proj_ba.weight", groups=key_heads,
        pieces=((0, value_heads), (value_heads, value_heads)),
    )  # fmt: skip
    yield Rule(neutral=own + "qkvz.weight", shape=(qkvz.rows, hidden), tail=(hidden,), parts=(qkvz,))
    yield Rule(neutral=own + "ba.weight", shape=(ba.rows, hidden), tail=(hidden,), parts=(ba,))
    channels, width = 2 * qk + v, mixer.conv_kernel
    conv = Part(name=hf + "conv1d.weight", pieces=((0, channels),))
    yield Rule(neutral=own + "conv.weight", shape=(channels, width), tail=(1, width), parts=(conv,))
    yield rule_of_one(own + "dt_bias", hf + "dt_bias", value_heads)
    yield rule_of_one(own + "A_log", hf + "A_log", value_heads)
    yield rule_of_one(own + "norm.weight", hf + "norm.weight", mixer.value_head_dim)
    yield rule_of_one(own + "out.weight", hf + "out_proj.weight", hidden, v)


def _swiglu_rules(own: str, hf: str, inner: int, hidden: int, *, bias: bool = False) -> Iterator[Rule]:
    gate_up = (("gate_proj", inner), ("up_proj", inner))
    yield from stacked(own + "gate_up", hf, gate_up, hidden, bias=bias)
    yield from stacked(own + "down", hf, (("down_proj", hidden),), inner, bias=bias)


def _moe_rules(ffn: MoE, hidden: int, own: str, hf: str, shared: str) -> Iterator[Rule]:
    experts = ffn.num_experts
    yield rule_of_one(own + "router.weight", hf + "gate.weight", experts, hidden)
    if ffn.selection_bias:
        name = hf + "gate.e_score_correction_bias"
        yield rule_of_one(own + "router.bias", name, experts, float32=True)
    gate_up = (("gate_proj", ffn.intermediate_size), ("up_proj", ffn.intermediate_size))
    yield _expert_rule(own, hf, "gate_up", gate_up, experts, hidden)
    yield _expert_rule(own, hf, "down", (("down_proj", hidden),), experts, ffn.intermediate_size)
    if ffn.shared_intermediate_size:
        inner = ffn.shared_intermediate_size
        yield from _swiglu_rules(own + "shared.", f"{hf}{shared}.", inner, hidden)
    if ffn.shared_gate:
        yield rule_of_one(own + "shared_gate.weight", f"{hf}{shared}_gate.weight", 1, hidden)


def _expert_rule(
    own: str, hf: str, name: str, parts: tuple[tuple[str, int], ...], experts: int, columns: int
) -> Rule:
    named, start = [], 0
    for expert in range(experts):
        for part, rows in parts:
            named.append(Part(name=f"{hf}experts.{expert}.{part}.weight", pieces=((start, rows),)))
            start += rows
    return Rule(
        neutral=f"{own}experts.{name}.weight", shape=(experts, start // experts, columns), tail=(columns,),
        parts=tuple(named), whole=f"{hf}experts.{name}_proj",
    )  # fmt: skip
