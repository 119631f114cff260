"""Hooks of the CUDA plugin. Everything here is data: neither torch nor a vendor's package is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl

from .device import CUDA
from .offers import offers

if TYPE_CHECKING:
    from grpo_core.devices.base import Device


@hookimpl
def grpo_devices() -> Iterable[Device]:
    """The device "cuda"."""
    return (CUDA,)


@hookimpl
def grpo_attention() -> Iterable[Impl]:
    return offers("attention")


@hookimpl
def grpo_linear_attention() -> Iterable[Impl]:
    return offers("linear_attention")


@hookimpl
def grpo_fused_moe() -> Iterable[Impl]:
    return offers("fused_moe")


@hookimpl
def grpo_fused_ops() -> Iterable[Impl]:
    return offers("fused_ops")


@hookimpl
def grpo_memory() -> Iterable[Impl]:
    return offers("memory")


@hookimpl
def grpo_collectives() -> Iterable[Impl]:
    return offers("collectives")
