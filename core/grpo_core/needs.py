"""What a model and a config ask of each op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .errors import ConfigError
from .impl import DeviceInfo, Need
from .layer_needs import bookkeeping_needs, layer_needs, norm
from .model.arch import MoE

if TYPE_CHECKING:
    from .config import Config
    from .model.arch import Arch


INDIFFERENT = ("optim.", "memory.", "comm.")
"""Beginnings of ops that no sequence passes through: consistency asks nothing of them."""


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
    router_dtype: str = "float32"
    """Of the logits of routers: "float32" or "float64"."""
    graph: bool = False
    """Ask for ops that are safe under graph capture."""
    deterministic: bool = False
    consistent: bool = False
    """Rollout and trainer give the same bits for the same sequence, whatever runs beside it."""


def facts_of(config: Config, device: DeviceInfo, *, world: int = 1) -> RunFacts:
    """The facts of a config on a device: "auto" becomes bfloat16 where the device has it fast.

    Raises `ConfigError` for `consistent` with two dtypes.
    """
    auto = "bfloat16" if "fast_bf16" in device.features else "float32"
    train = auto if config.train.dtype == "auto" else config.train.dtype
    rollout = train if config.rollout.dtype == "auto" else config.rollout.dtype
    if config.consistent and rollout != train:
        raise ConfigError(
            f"consistent: true with a trainer in {train} and a rollout in {rollout}",
            why="two dtypes round differently, so log-probs could not be equal bit for bit",
            fix="remove rollout.dtype, or set it to the value of train.dtype",
        )
    return RunFacts(
        train_dtype=train,
        rollout_dtype=rollout,
        world=world,
        recompute=config.train.recompute,
        share_prompt=config.train.share_prompt,
        router_dtype=config.train.router_dtype,
        consistent=config.consistent,
    )


def needs_of(arch: Arch, facts: RunFacts) -> list[Need]:
    """Every need of a run, without repeats; an op has several where layers or roles differ.

    An offer serves an op only if it fits all its needs, since one function is bound for all layers.
    """
    needs = [need for layer in arch.layers for need in layer_needs(layer, arch, facts)]
    needs += bookkeeping_needs(arch, facts) + _model_needs(arch, facts) + _run_needs(facts)
    distinct: list[Need] = []
    for need in needs:
        need = replace(
            need,
            graph=facts.graph,
            deterministic=facts.deterministic,
            batch_invariant=facts.consistent and not need.op.startswith(INDIFFERENT),
        )
        if need not in distinct:
            distinct.append(need)
    return distinct


def _model_needs(arch: Arch, facts: RunFacts) -> list[Need]:
    vocabulary = {"vocab_size": arch.vocab_size}
    head = {"hidden_size": arch.hidden_size, **vocabulary}
    # In consistent mode routers go through the same rows of a fixed number, in their own dtype.
    routers = facts.consistent and any(isinstance(layer.ffn, MoE) for layer in arch.layers)
    router = [Need(op="linear.dense", facts={"dtype": facts.router_dtype}, backward=True)] if routers else []
    return [
        *norm(arch.hidden_size, arch.zero_centered_norm, facts),
        *router,
        Need(op="linear.dense", facts={"dtype": facts.train_dtype}, backward=True),
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
