"""One fault, and the plugin that brings it to the simulated device."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS, Contract
from grpo_core.plugin_checks import CACHES

from ..sim.offers import offers

NAME = "mutant"
"""Of the plugin and of its device."""
RANK = 90
"""Above the healthy device's, so that a plan takes the faulty offer."""
HEALTHY = "sim"


@dataclass(frozen=True, slots=True)
class Mutant:
    """A row of the table: a fault by name, who must notice it, where it sits and what it does."""

    name: str
    level: str
    """The level that must catch it; another one does not count."""
    where: str
    """An op; "device"; "switch" for one of the simulator's own; "plugin" for a whole plugin."""
    how: Any
    """By `where`: a function that gets what works before the op's arguments, or a class made from the one
    that works; a device made from the healthy one; a function of `sim.runtime.ops`; a module's name."""
    declares: Callable[[Impl], Impl] | None = None
    """What an op's offer says of itself, where that is the fault."""
    ask: str = ""
    """Part of the names of the cases to ask first, which only saves time."""
    timeout: float = 0.0
    """Seconds for one case, where the fault is to hang; 0 for the case's own."""

    @property
    def slug(self) -> str:
        """The name as a word."""
        return re.sub(r"\W+", "_", self.name).strip("_").lower()

    @property
    def lasting(self) -> bool:
        """Whether the process is of no use to others afterwards."""
        return self.where in ("switch", "plugin") or self.timeout > 0

    @property
    def owner(self) -> str:
        """The plugin whose cases are asked."""
        return NAME if self.where in CONTRACTS or self.where == "plugin" else HEALTHY


def plugin_of(mutant: Mutant) -> object:
    """An ordinary plugin, but not a module: it answers one hook with the faulty offer or device."""
    if mutant.where == "device":
        return SimpleNamespace(grpo_devices=_hook(lambda: _devices(mutant)))
    hook = CONTRACTS[mutant.where].hook
    return SimpleNamespace(**{f"grpo_{hook}": _hook(lambda: _offers(mutant))})


def _hook(answer: Callable[[], Iterable[Any]]) -> Callable[..., Any]:
    def ask() -> Iterable[Any]:
        return answer()

    marked: Callable[..., Any] = hookimpl(ask)
    return marked


def _devices(mutant: Mutant) -> Iterable[Any]:
    from ..sim.device import SIM

    yield mutant.how(SIM)


def _offers(mutant: Mutant) -> Iterable[Impl]:
    """The faulty offer; and for a cache the healthy readers, that say they read it."""
    healthy = healthy_offers()
    offer = replace(healthy[mutant.where], load=f"{__package__}.served:{mutant.slug}", rank=RANK)
    yield mutant.declares(offer) if mutant.declares else offer
    for op in CACHES.get(mutant.where, ()):
        if op in healthy:
            limits = {**healthy[op].limits, "cache": frozenset({f"{NAME}:{offer.name}"})}
            yield replace(healthy[op], limits=limits, rank=RANK)


@functools.cache
def healthy_offers() -> Mapping[str, Impl]:
    """What the simulated device offers, by op."""
    hooks = sorted({contract.hook for contract in CONTRACTS.values()})
    engines = [_engine(contract) for contract in CONTRACTS.values() if contract.op.startswith("engine.")]
    return {impl.op: impl for impl in (*engines, *(impl for hook in hooks for impl in offers(hook)))}


def _engine(contract: Contract) -> Impl:
    """Core's engine for this device alone, so that the references' runs on the CPU stay what they are."""
    return Impl(
        op=contract.op, name="plain", device=HEALTHY, load=contract.reference or "",
        backward=contract.backward, contract=contract.version,
    )  # fmt: skip
