"""The core's own plugin: the references of every contract, the native engines and the named things.

It goes through the same hooks as any other plugin. Named things are pointers, so that listing them
imports neither torch nor a dataset library.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import TYPE_CHECKING

from .hookspecs import hookimpl
from .impl import NOTHING, DeviceInfo, Impl, Need
from .ops.contract import CONTRACTS, Contract
from .plugin_checks import CACHE_OF

if TYPE_CHECKING:
    from .devices.base import Device
    from .registry import Registry

REFERENCE_LIMITS: Mapping[str, Mapping[str, Container[object]]] = {
    **{op: {"cache": frozenset({"core:reference"})} for op in CACHE_OF},
    "comm.collectives": {"world": frozenset({1})},
}
"""What the references cannot do: they read their own cache, and know no other process."""

BATCH_INVARIANT = frozenset({"attention.cache", "mla.cache", "norm.rms", "rope.apply", "moe.dispatch"})
"""References that store or move rows, or compute each one alone in operations without a vector tail."""


def _has_float64(device: DeviceInfo, need: Need) -> str | None:
    return (
        None
        if "float64" in device.dtypes
        else f"computes in float64, which {device.name or device.type} lacks"
    )


WHEN: Mapping[str, Callable[[DeviceInfo, Need], str | None]] = {"sample.token": _has_float64}
"""Objections of references."""


def _references(hook: str) -> Iterable[Impl]:
    for contract in CONTRACTS.values():
        if contract.hook == hook and contract.reference is not None:
            yield _engine(contract) if contract.op.startswith("engine.") else _reference(contract)


def _reference(contract: Contract) -> Impl:
    return Impl(
        op=contract.op,
        name="reference",
        device="*",
        load=contract.reference or "",
        limits=REFERENCE_LIMITS.get(contract.op, NOTHING),
        when=WHEN.get(contract.op),
        backward=contract.backward,
        batch_invariant=contract.op in BATCH_INVARIANT,
        rank=0,
        contract=contract.version,
    )


def _engine(contract: Contract) -> Impl:
    return Impl(
        op=contract.op,
        name="native",
        device="*",
        load=contract.reference or "",
        batch_invariant=True,
        rank=50,
        contract=contract.version,
    )


@hookimpl
def grpo_devices() -> Iterable[Device]:
    """The CPU, which is always there."""
    from .devices.cpu import Cpu

    return (Cpu(),)


@hookimpl
def grpo_attention() -> Iterable[Impl]:
    return _references("attention")


@hookimpl
def grpo_linear_attention() -> Iterable[Impl]:
    return _references("linear_attention")


@hookimpl
def grpo_fused_moe() -> Iterable[Impl]:
    return _references("fused_moe")


@hookimpl
def grpo_fused_ops() -> Iterable[Impl]:
    return _references("fused_ops")


@hookimpl
def grpo_memory() -> Iterable[Impl]:
    return _references("memory")


@hookimpl
def grpo_collectives() -> Iterable[Impl]:
    return _references("collectives")


@hookimpl
def grpo_rollout_engines() -> Iterable[Impl]:
    """The native engine, built on the bound ops."""
    return _references("rollout_engines")


@hookimpl
def grpo_train_backends() -> Iterable[Impl]:
    """The native trainer, built on the bound ops."""
    return _references("train_backends")


@hookimpl
def grpo_register(registry: Registry) -> None:
    """Advantages, losses, rewards, datasets and trackers of core, as pointers."""
    registry.advantage("group_norm", "grpo_core.algo.advantage:group_norm")
    registry.advantage("group_mean", "grpo_core.algo.advantage:group_mean")
    registry.loss("ppo_clip", "grpo_core.algo.loss:ppo_clip")
    for name, function in (
        ("exact", "exact"),
        ("number", "number"),
        ("regex", "regex"),
        ("math", "math"),
        ("reasoning_gym", "gym_score"),
    ):
        registry.reward(name, f"grpo_core.data.rewards:{function}")
    registry.dataset("reasoning-gym", "grpo_core.data.gym:open_gym")
