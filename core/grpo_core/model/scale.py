"""A model's size on paper: parameters of each part, counted from its `Arch` alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE

NAMES = {Attention: "attention", MLA: "latent attention", GatedDelta: "gated delta"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One kind of part of a model."""

    name: str
    count: int
    """How often it is there."""
    each: int
    """Parameters of one."""
    active: int
    """Of one, those that a token meets."""

    @property
    def total(self) -> int:
        """Parameters of all."""
        return self.count * self.each


def items(arch: Arch) -> tuple[Item, ...]:
    """The parts of the decoder in their order; their totals add up to `total_parameters`."""
    hidden, table = arch.hidden_size, arch.vocab_size * arch.hidden_size
    found: Counter[tuple[str, int, int]] = Counter({("embedding", table, table): 1})
    for layer in arch.layers:
        found.update(_parts(layer, hidden))
    found[("norm", hidden, hidden)] += 1
    if not arch.tie_word_embeddings:
        found[("head", table, table)] += 1
    return tuple(
        Item(name=name, count=count, each=each, active=active)
        for (name, each, active), count in found.items()
    )


def _parts(layer: Layer, hidden: int) -> Iterator[tuple[str, int, int]]:
    yield "norm", hidden, hidden
    mixer = mixer_parameters(layer.mixer, hidden)
    yield NAMES[type(layer.mixer)], mixer, mixer
    yield "norm", hidden, hidden
    ffn = layer.ffn
    if isinstance(ffn, DenseMLP):
        dense = dense_parameters(ffn, hidden)
        yield "dense feed-forward", dense, dense
        return
    router, shared, expert = moe_parameters(ffn, hidden)
    yield "router", router, router
    yield f"{ffn.num_experts} experts", ffn.num_experts * expert, ffn.top_k * expert
    if shared:
        yield "shared expert", shared, shared


def total_parameters(arch: Arch) -> int:
    """All numbers of the decoder (multi-token prediction left out); a tied head counts once."""
    return sum(item.total for item in items(arch))


def active_parameters(arch: Arch) -> int:
    """Those that one token meets: `top_k` of the experts, and everything else."""
    return sum(item.count * item.active for item in items(arch))


def frozen_parameters(arch: Arch) -> int:
    """Selection biases: float32, not trained."""
    return sum(
        layer.ffn.num_experts
        for layer in arch.layers
        if isinstance(layer.ffn, MoE) and layer.ffn.selection_bias
    )


def mtp_parameters(arch: Arch) -> int:
    """Of the layers for multi-token prediction, without their copies of embedding and head.

    Each is a decoder layer, three norms and a projection of [2 C] to [C].
    """
    if arch.mtp is None:
        return 0
    hidden = arch.hidden_size
    layer = sum(each for _, each, _ in _parts(arch.mtp.layer, hidden))
    return arch.mtp.num_layers * (layer + 3 * hidden + 2 * hidden * hidden)


def mixer_parameters(mixer: Attention | MLA | GatedDelta, hidden: int) -> int:
    """Of one layer's mixer, without the norm before it."""
    if isinstance(mixer, Attention):
        q, kv = mixer.num_attention_heads * mixer.head_dim, mixer.num_key_value_heads * mixer.head_dim
        rows = q * (2 if mixer.output_gate else 1) + 2 * kv
        biases = rows * mixer.qkv_bias + hidden * mixer.out_bias
        return (rows + q) * hidden + biases + 2 * mixer.head_dim * mixer.qk_norm
    if isinstance(mixer, MLA):
        return _mla_parameters(mixer, hidden)
    qk, v = mixer.num_key_heads * mixer.key_head_dim, mixer.num_value_heads * mixer.value_head_dim
    projections = (2 * qk + 2 * v + 2 * mixer.num_value_heads + v) * hidden
    convolution = (2 * qk + v) * mixer.conv_kernel
    return projections + convolution + 2 * mixer.num_value_heads + mixer.value_head_dim


def _mla_parameters(mixer: MLA, hidden: int) -> int:
    heads, latent = mixer.num_attention_heads, mixer.kv_lora_rank
    q_rows = heads * (mixer.qk_nope_head_dim + mixer.qk_rope_head_dim)
    down = latent + mixer.qk_rope_head_dim
    total = down * hidden + latent + heads * (mixer.qk_nope_head_dim + mixer.v_head_dim) * latent
    total += heads * mixer.v_head_dim * hidden + mixer.bias * (down + hidden)
    if mixer.q_lora_rank is None:
        return total + q_rows * hidden
    rank = mixer.q_lora_rank
    return total + rank * hidden + rank + q_rows * rank + mixer.bias * rank


def dense_parameters(ffn: DenseMLP, hidden: int) -> int:
    """Of one dense feed-forward."""
    return 3 * hidden * ffn.intermediate_size + ffn.bias * (2 * ffn.intermediate_size + hidden)


def moe_parameters(ffn: MoE, hidden: int) -> tuple[int, int, int]:
    """Of the router with its bias, of the shared expert with its gate, and of one routed expert."""
    router = ffn.num_experts * hidden + ffn.num_experts * ffn.selection_bias
    shared = 3 * hidden * ffn.shared_intermediate_size + hidden * ffn.shared_gate
    return router, shared, 3 * hidden * ffn.intermediate_size
