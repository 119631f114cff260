"""The twelve hooks. A plugin implements any of them; each docstring is the contract.

Hooks are asked once, while planning, and answer with data. No hook has an argument that is not needed
and none has a default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .devices.base import Device
    from .impl import Impl
    from .model.plugin import ModelPlugin
    from .registry import CommandRegistry, Registry

hookspec = pluggy.HookspecMarker("grpo")
hookimpl = pluggy.HookimplMarker("grpo")


@hookspec
def grpo_devices() -> Iterable[Device]:  # type: ignore[empty-body]
    """Devices that this plugin drives. Listing imports neither a vendor package nor torch."""


@hookspec
def grpo_attention() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `attention.*` and `mla.*`."""


@hookspec
def grpo_linear_attention() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `gated_delta.*` and `short_conv.*`."""


@hookspec
def grpo_fused_moe() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `moe.*`."""


@hookspec
def grpo_fused_ops() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `norm.*`, `rope.*`, `mlp.*`, `linear.*`, `loss.*`, `sample.*` and `optim.*`."""


@hookspec
def grpo_memory() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `memory.allocator`: a class with the `Memory` Protocol."""


@hookspec
def grpo_collectives() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `comm.collectives`: a class with the `Collectives` Protocol."""


@hookspec
def grpo_rollout_engines() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `engine.rollout`: a class with the `Rollout` Protocol."""


@hookspec
def grpo_train_backends() -> Iterable[Impl]:  # type: ignore[empty-body]
    """Offers for `engine.train`: a class with the `Trainer` Protocol."""


@hookspec
def grpo_models() -> Iterable[ModelPlugin]:  # type: ignore[empty-body]
    """Model families: architectures claimed, `Arch`, `WeightMap`, chat template, recipe."""


@hookspec
def grpo_register(registry: Registry) -> None:
    """Add named things: `registry.reward/.dataset/.tracker/.advantage/.loss(name, obj)`."""


@hookspec
def grpo_commands(cli: CommandRegistry) -> None:
    """Add commands: `cli.command(name, help, configure, run)`."""
