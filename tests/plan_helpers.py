"""Plugins, catalogues and devices made in memory, for tests of loading, planning and binding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

from grpo_core.catalogue import Catalogue, Offer, PluginInfo
from grpo_core.hookspecs import hookimpl
from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.registry import Registry

CPU = DeviceInfo(type="cpu", name="test processor", dtypes=frozenset({"float32", "bfloat16"}))
ACME = DeviceInfo(type="acme", vendor="Acme", name="Acme One", dtypes=frozenset({"bfloat16"}))
VARLEN = Need(
    op="attention.varlen", facts={"dtype": "bfloat16", "head_dim": 64, "window": False}, backward=True
)


def offer(op: str = "attention.varlen", name: str = "fast", **fields: Any) -> Impl:
    """An offer for the CPU that can do everything, at rank 50, unless told otherwise."""
    values: dict[str, Any] = {"device": "cpu", "load": "acme.ops:call", "backward": True, "contract": 1}
    return Impl(op=op, name=name, **{**values, **fields})


def plugin(**hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plugin object with marked hook implementations: `plugin(attention=lambda: [...])`."""
    return SimpleNamespace(**{f"grpo_{name}": hookimpl(function) for name, function in hooks.items()})


def offering(*impls: Impl) -> SimpleNamespace:
    """A plugin that makes these offers, each under the hook of its op."""
    by_hook: dict[str, list[Impl]] = {}
    for impl in impls:
        by_hook.setdefault(CONTRACTS[impl.op].hook, []).append(impl)

    def answer(listed: list[Impl]) -> Callable[[], list[Impl]]:
        return lambda: listed

    return plugin(**{hook: answer(listed) for hook, listed in by_hook.items()})


def catalogue_of(plugins: Mapping[str, Sequence[Impl]]) -> Catalogue:
    """A catalogue of these plugins and nothing else."""
    offers: dict[str, list[Offer]] = {}
    for name, impls in plugins.items():
        for impl in impls:
            offers.setdefault(impl.op, []).append(Offer(plugin=name, impl=impl))
    return Catalogue(
        plugins=tuple(
            PluginInfo(id=name, distribution=f"dist-{name}", version="1.0", module=name, hooks=())
            for name in plugins
        ),
        offers={op: tuple(sorted(listed, key=lambda item: item.id)) for op, listed in offers.items()},
        devices=MappingProxyType({}),
        models=MappingProxyType({}),
        registry=Registry(),
        commands=MappingProxyType({}),
        owners=MappingProxyType({}),
        failures=(),
    )
