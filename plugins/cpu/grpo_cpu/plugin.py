"""Hooks of the CPU plugin. Everything here is data: neither torch nor a compiler is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl

from . import consistent_offers, native_offers, torch_offers

if TYPE_CHECKING:
    from grpo_core.devices.base import Device

SOURCES = (torch_offers, native_offers, consistent_offers)
"""Modules with an `offers()` that yields pairs of a hook's name and an offer."""


def _for(hook: str) -> list[Impl]:
    return [impl for source in SOURCES for name, impl in source.offers() if name == hook]


@hookimpl
def grpo_devices() -> Iterable[Device]:
    """None of its own: the core knows the CPU."""
    return ()


@hookimpl
def grpo_attention() -> Iterable[Impl]:
    return _for("attention")


@hookimpl
def grpo_linear_attention() -> Iterable[Impl]:
    return _for("linear_attention")


@hookimpl
def grpo_fused_moe() -> Iterable[Impl]:
    return _for("fused_moe")


@hookimpl
def grpo_fused_ops() -> Iterable[Impl]:
    return _for("fused_ops")


@hookimpl
def grpo_memory() -> Iterable[Impl]:
    return _for("memory")


@hookimpl
def grpo_collectives() -> Iterable[Impl]:
    return _for("collectives")
