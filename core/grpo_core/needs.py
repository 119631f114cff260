"""What a model and a config ask of each op."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .impl import DeviceInfo, Need

if TYPE_CHECKING:
    from .config import Config
    from .model.arch import Arch, Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Settings of a run that decide which offers fit. Dtypes are "bfloat16" or "float32"."""

    train_dtype: str
    rollout_dtype: str
    world: int = 1
    """Training processes."""
    recompute: bool = False
    share_prompt: bool = True
    """Off leaves `attention.shared_prefix` optional, for a device that does not have it."""
    graph: bool = False
    """Ask for ops that are safe under graph capture."""
    deterministic: bool = False


def facts_of(config: Config, device: DeviceInfo, *, world: int = 1) -> RunFacts:
    """The facts of a config on a device: "auto" becomes bfloat16 where the device has it fast."""
    auto = "bfloat16" if "fast_bf16" in device.features else "float32"
    train = auto if config.train.dtype == "auto" else config.train.dtype
    rollout = train if config.rollout.dtype == "auto" else config.rollout.dtype
    return RunFacts(
        train_dtype=train,
        rollout_dtype=rollout,
        world=world,
        recompute=config.train.recompute,
        share_prompt=config.train.share_prompt,
    )


def needs_of(arch: Arch, facts: RunFacts) -> list[Need]:
    """Every need of a run, without repeats; an op has several where layers or roles differ.

    An offer serves an op only if it fits all its needs, since one function is bound for all layers.
    """
    needs = [need for layer in arch.layers for need in _layer_needs(layer, arch, facts)]
    needs += _model_needs(arch, facts) + _run_needs(facts)
    distinct: list[Need] = []
    for need in needs:
        need = replace(need, graph=facts.graph, deterministic=facts.deterministic)
        if need not in distinct:
            distinct.append(need)
    return distinct


def _layer_needs(layer: Layer, arch: Arch, facts: RunFacts) -> list[Need]:
    mixer, rope = layer.mixer, layer.mixer.rope
    heads: Mapping[str, object] = {
        "head_dim": mixer.head_dim,
        "v_head_dim": mixer.head_dim,
        "num_key_value_groups": mixer.num_attention_heads // mixer.num_key_value_heads,
        "window": mixer.window is not None,
    }
    train = {"dtype": facts.train_dtype, **heads}
    rollout = {"dtype": facts.rollout_dtype, **heads}
    step = {"qk_norm": mixer.qk_norm, "interleaved": rope.interleaved, "rotary_dim": rope.rotary_dim}
    rotary = {"rotary_dim": rope.rotary_dim, "head_dim": mixer.head_dim, "interleaved": rope.interleaved}
    swiglu = {"intermediate_size": layer.ffn.intermediate_size}
    needs = [
        Need(op="attention.varlen", facts=train, backward=True),
        Need(op="attention.shared_prefix", facts=train, backward=True, required=facts.share_prompt),
        Need(op="attention.cache", facts=rollout),
        Need(op="attention.prefill", facts=rollout),
        Need(op="attention.decode", facts=rollout),
        Need(op="attention.step", facts={**rollout, **step}, required=False),
        *_both("rope.apply", rotary, facts),
        *_both("mlp.swiglu", swiglu, facts),
    ]
    if mixer.qk_norm:
        needs += _both("norm.rms", {"hidden_size": mixer.head_dim, "zero_centered": False}, facts)
    return needs


def _model_needs(arch: Arch, facts: RunFacts) -> list[Need]:
    vocabulary = {"vocab_size": arch.vocab_size}
    head = {"hidden_size": arch.hidden_size, **vocabulary}
    return [
        *_both("norm.rms", {"hidden_size": arch.hidden_size, "zero_centered": False}, facts),
        Need(op="linear.packed", facts={"dtype": facts.rollout_dtype}),
        Need(op="sample.token", facts={"dtype": facts.rollout_dtype, **vocabulary}),
        Need(op="loss.logprob", facts={"dtype": facts.train_dtype, **head}, backward=True),
        Need(op="optim.adamw", facts={"dtype": "float32"}),
    ]


def _run_needs(facts: RunFacts) -> list[Need]:
    return [
        Need(op="memory.allocator"),
        Need(op="comm.collectives", facts={"world": facts.world}),
        Need(op="engine.rollout", facts={"dtype": facts.rollout_dtype, "world": facts.world}),
        Need(
            op="engine.train",
            facts={"dtype": facts.train_dtype, "world": facts.world, "recompute": facts.recompute},
        ),
    ]


def _both(op: str, sizes: Mapping[str, object], facts: RunFacts) -> list[Need]:
    """An op of the decoder, which the trainer differentiates and the rollout runs in its own dtype."""
    return [
        Need(op=op, facts={"dtype": facts.train_dtype, **sizes}, backward=True),
        Need(op=op, facts={"dtype": facts.rollout_dtype, **sizes}),
    ]
