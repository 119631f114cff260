"""What one rank of a parallel layout holds of a model, on paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import ConfigError
from .arch import MLA, Arch, Attention, DenseMLP, GatedDelta, Layer, MoE
from .scale import dense_parameters, mixer_parameters, moe_parameters

MOMENTS = 8
"""Bytes of AdamW's two float32 moments of a parameter."""
GRADIENT = 4
"""Gradients are summed in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups. Experts are spread over ranks of the data and tensor groups together."""

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    distributed_optimizer: bool = False
    """Whether ranks that hold the same weights share out their optimizer state (ZeRO stage 1)."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's moments, and the lower halves of the float32 masters where weights are bfloat16."""
    kv_cache_token: int
    """Of each cached token."""
    state_sequence: int
    """Of each sequence in generation, whatever its length: recurrent states and convolution windows."""

    @property
    def training(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """Parameters of one rank: those that follow the dense groups, routed experts, and frozen ones."""

    dense: int = 0
    experts: int = 0
    frozen: int = 0

    def __add__(self, other: _Held) -> _Held:
        return _Held(
            dense=self.dense + other.dense, experts=self.experts + other.experts,
            frozen=self.frozen + other.frozen,
        )  # fmt: skip


def rank_bytes(arch: Arch, layout: Layout, *, dtype: str) -> tuple[int, Bytes]:
    """The pipeline stage whose ranks hold most, and what one of them holds.

    Layers are cut into stages as evenly as they go, earlier ones taking one more. `dtype` is "bfloat16" or
    "float32". Raises `ConfigError` where the layout does not divide the model.
    """
    check_layout(arch, layout)
    stages = [_stage_bytes(arch, layout, stage, dtype) for stage in range(layout.pipeline)]
    fullest = max(range(layout.pipeline), key=lambda stage: stages[stage].training)
    return fullest, stages[fullest]


def check_layout(arch: Arch, layout: Layout) -> None:
    """Raises `ConfigError` that names all sizes which do not divide the model."""
    troubles = list(dict.fromkeys(_troubles(arch, layout)))
    if troubles:
        raise ConfigError(
            "this layout does not divide the model",
            why="; ".join(troubles[:4]),
            fix="choose sizes that divide heads, experts, layers and each other",
        )


def _troubles(arch: Arch, layout: Layout) -> Iterator[str]:
    for name in ("data", "tensor", "pipeline", "expert"):
        if getattr(layout, name) < 1:
            yield f"{name} parallel size {getattr(layout, name)} is below 1"
            return
    if layout.pipeline > len(arch.layers):
        yield f"{layout.pipeline} pipeline stages for {len(arch.layers)} layers"
    if (layout.data * layout.tensor) % layout.expert:
        ranks = layout.data * layout.tensor
        yield f"expert parallel size {layout.expert} does not divide data x tensor {ranks}"
    for layer in arch.layers:
        for what, count in _divided(layer):
            if count % layout.tensor and not (what == "key-value heads" and layout.tensor % count == 0):
                yield f"tensor parallel size {layout.tensor} does not divide {count} {what}"
        if isinstance(layer.ffn, MoE) and layer.ffn.num_experts % layout.expert:
            yield f"expert parallel size {layout.expert} does not divide {layer.ffn.num_experts} experts"


def _divided(layer: Layer) -> Iterator[tuple[str, int]]:
    mixer, ffn = layer.mixer, layer.ffn
    if isinstance(mixer, GatedDelta):
        yield "key heads of the gated delta layers", mixer.num_key_heads
    else:
        yield "attention heads", mixer.num_attention_heads
    if isinstance(mixer, Attention):
        yield "key-value heads", mixer.num_key_value_heads
    if isinstance(ffn, DenseMLP):
        yield "rows of the feed-forward", ffn.intermediate_size
    elif ffn.shared_intermediate_size:
        yield "rows of the shared expert", ffn.shared_intermediate_size


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """Layers of one pipeline stage."""
    each, more = divmod(layers, stages)
    start = stage * each + min(stage, more)
    return range(start, start + each + (stage < more))


def _stage_bytes(arch: Arch, layout: Layout, stage: int, dtype: str) -> Bytes:
    layers = [arch.layers[index] for index in stage_layers(len(arch.layers), layout.pipeline, stage)]
    held = sum((_layer_held(layer, arch.hidden_size, layout) for layer in layers), start=_Held())
    held += _outer_held(arch, layout, stage)
    width, master = (2, 2) if dtype == "bfloat16" else (4, 0)
    trained = held.dense + held.experts
    dense_ranks = layout.data if layout.distributed_optimizer else 1
    expert_ranks = layout.data * layout.tensor // layout.expert if layout.distributed_optimizer else 1
    state = -(-held.dense // dense_ranks) + -(-held.experts // expert_ranks)
    return Bytes(
        weights=trained * width + held.frozen * 4,
        gradients=trained * GRADIENT,
        optimizer=state * (MOMENTS + master),
        kv_cache_token=sum(_cache_token(layer, layout.tensor, width) for layer in layers),
        state_sequence=sum(_state_sequence(layer, layout.tensor, width) for layer in layers),
    )


def _outer_held(arch: Arch, layout: Layout, stage: int) -> _Held:
    table = -(-arch.vocab_size // layout.tensor) * arch.hidden_size
    first, last = stage == 0, stage == layout.pipeline - 1
    # A tied head on another stage than the embedding needs a copy of it.
    tables = 1 if first and last and arch.tie_word_embeddings else first + last
    return _Held(dense=tables * table + last * arch.hidden_size)


def _layer_held(layer: Layer, hidden: int, layout: Layout) -> _Held:
    tensor, ffn = layout.tensor, layer.ffn
    dense = 2 * hidden + mixer_parameters(_mixer_share(layer.mixer, tensor), hidden)
    if isinstance(ffn, DenseMLP):
        share = replace(ffn, intermediate_size=ffn.intermediate_size // tensor)
        return _Held(dense=dense + dense_parameters(share, hidden))
    frozen = ffn.num_experts * ffn.selection_bias
    local = replace(ffn, shared_intermediate_size=ffn.shared_intermediate_size // tensor)
    router, shared, expert = moe_parameters(local, hidden)
    return _Held(
        dense=dense + router - frozen + shared,
        experts=ffn.num_experts // layout.expert * expert,
        frozen=frozen,
    )


def _mixer_share(mixer: Attention | MLA | GatedDelta, tensor: int) -> Attention | MLA | GatedDelta:
    """The heads of one tensor-parallel rank; the latents' projections are whole on each."""
    if isinstance(mixer, GatedDelta):
        return replace(
            mixer,
            num_key_heads=mixer.num_key_heads // tensor,
            num_value_heads=mixer.num_value_heads // tensor,
        )
    heads = mixer.num_attention_heads // tensor
    if isinstance(mixer, MLA):
        return replace(mixer, num_attention_heads=heads)
    return replace(
        mixer, num_attention_heads=heads, num_key_value_heads=max(1, mixer.num_key_value_heads // tensor)
    )


def _cache_token(layer: Layer, tensor: int, width: int) -> int:
    mixer = layer.mixer
    if isinstance(mixer, GatedDelta):
        return 0
    if isinstance(mixer, MLA):
        return (mixer.kv_lora_rank + mixer.qk_rope_head_dim) * width
    return 2 * max(1, mixer.num_key_value_heads // tensor) * mixer.head_dim * width


def _state_sequence(layer: Layer, tensor: int, width: int) -> int:
    mixer = _mixer_share(layer.mixer, tensor)
    if not isinstance(mixer, GatedDelta):
        return 0
    qk, v = mixer.num_key_heads * mixer.key_head_dim, mixer.num_value_heads * mixer.value_head_dim
    # The recurrent state is float32, the window of the convolution has the compute dtype.
    return v * mixer.key_head_dim * 4 + (2 * qk + v) * (mixer.conv_kernel - 1) * width
