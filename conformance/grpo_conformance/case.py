"""What the suite is made of: cases as data, the target they look at, the outcome of one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from grpo_core.catalogue import Catalogue, Offer
    from grpo_core.devices.base import Device, Probe

LEVELS = ("plugin", "device", "ops", "memory", "collectives", "system", "speed")
"""Names of levels 0 to 6."""

Status = Literal["pass", "fail", "error", "crash", "timeout", "not_declared", "known"]
"""`fail`: a number or property is wrong; `error`: an exception came where none may; `crash` and `timeout`:
the process died or did not answer; `not_declared`: what the case is about is declared unsupported; `known`:
it failed, as the vendor's file of known failures says."""

BROKEN = ("fail", "error", "crash", "timeout")
"""Statuses of a promise that does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question to a target. Everything in it survives a trip to another process."""

    id: str
    """Stable and unique: "ops/attention.varlen/cpu:native_varlen/bfloat16/ragged"."""
    level: int
    subject: str
    """What passes or fails: an offer's id, or "device", "plugin"."""
    run: str
    """"module:function" of a `Check`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Its keyword arguments: plain JSON values."""
    timeout: float = 60.0
    """Seconds until the case counts as hung and its process is replaced."""
    room: str = ""
    """Cases of one room share a process; empty is a room for each subject."""
    alone: bool = False
    """Run in a fresh process of its own, because it may leave the device in any state."""
    fragile: bool = False
    """A failure of it may leave the device in any state, so that the process ends with it."""
    timed: bool = False
    """Its outcome depends on limits of time besides its own, so that a busy machine can spoil it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one case found."""

    status: Status
    message: str = ""
    """What went wrong, in words; empty for a plain pass."""
    error: float | None = None
    """Largest error against the float64 oracle, in the units of `tolerance`."""
    tolerance: float | None = None
    worst: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of the worst comparison: sizes, seed, where it is, what was got and wanted."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Measured values that are reported and not judged."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device with everything that the installed plugins offer for it."""

    device: Device
    probe: Probe
    catalogue: Catalogue
    offers: Mapping[str, tuple[Offer, ...]]
    """By op: offers of its torch type that are not refused for missing requirements."""
    engines: Mapping[str, str] = field(default_factory=dict)
    """"rollout" and "train" -> id of the engine of whole runs, where it is not core's own."""


class Check(Protocol):
    """The function behind `Case.run`."""

    def __call__(self, target: Target, **args: Any) -> Outcome: ...


class Collector(Protocol):
    """A level's `cases(target)`: every case that the target's declarations ask for, in a fixed order."""

    def __call__(self, target: Target, *, quick: bool) -> Iterable[Case]: ...


def check_of(case: Case) -> Callable[..., Outcome]:
    """The function that a case names."""
    module, _, name = case.run.partition(":")
    check: Callable[..., Outcome] = getattr(importlib.import_module(module), name)
    return check


def passed(**found: Any) -> Outcome:
    """A pass, with whatever was measured."""
    return Outcome(status="pass", **found)


def failed(message: str, **found: Any) -> Outcome:
    """A failure in words, with whatever was measured."""
    return Outcome(status="fail", message=message, **found)
