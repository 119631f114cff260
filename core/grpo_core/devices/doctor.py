"""What a device's plugin can tell of the host: checks with their fixes, and versions that were tested.

A `Device` with an attribute `doctor`, the dotted name of a module, brings it; the module implements `Doctor`.
It is imported by `grpo doctor` alone, so planning and training never pay for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError
from ..plugin_checks import did_you_mean
from ..plugins import Raised, attempt

if TYPE_CHECKING:
    from .base import Device

OK, MISSING, WRONG, ADVICE, UNKNOWN = "ok", "missing", "wrong", "advice", "unknown"
STATUSES: Mapping[str, str] = MappingProxyType(
    {
        OK: "as it should be",
        MISSING: "not here, and the device cannot be used without it",
        WRONG: "here, but the device cannot be used until it is mended",
        ADVICE: "the device works without; the fix makes it faster, safer or able to do more",
        UNKNOWN: "could not be found out on this host",
    }
)
"""What can be said of a part of the host."""
BROKEN = frozenset({MISSING, WRONG})
"""Statuses that keep the device from being used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was found of one part of the host."""

    part: str
    """What was looked at: "driver", "open files"."""
    status: str
    """One of `STATUSES`."""
    why: str
    """What was found, as a person would say it."""
    fix: str = ""
    """The next step, often a command; "" only where the status is "ok" or "unknown"."""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {', '.join(STATUSES)}, not {self.status!r}")
        if not self.fix and self.status not in (OK, UNKNOWN):
            raise ValueError(f"{self.part} is {self.status} and has no fix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of an installation."""

    command: str = ""
    """A line of POSIX shell; "$constraints" is the path of the row's constraints file."""
    why: str = ""
    """What it is for; of a step without a command, what to do by hand."""
    machine: str = ""
    """Processor that it is for, as `platform.machine()` says it; "" for all."""
    optional: bool = False
    """Whether a run can do without; printed as a comment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Versions that belong together, and how far that was checked."""

    name: str
    versions: Mapping[str, str]
    """Component -> version. Names of distributions are spelled as pip spells them."""
    proof: str
    """One of `grpo_core.impl.PROOFS`."""
    basis: str
    """What was checked, and where the rest of the row comes from."""
    constraints: str
    """The file for pip's `-c`, inside a package: "acme/constraints/acme-1.txt"."""
    steps: tuple[Step, ...]
    """From a host with its operating system and grpo-core to one that trains."""


class Doctor(Protocol):
    """The module that `Device.doctor` names."""

    def checks(self) -> Iterable[Check]:
        """What was found on this host, the most basic first; no runtime is started in this process."""
        ...

    def rows(self) -> Iterable[Row]:
        """The tested rows, the recommended one first."""
        ...


def doctor_of(device: Device) -> Doctor | Raised | None:
    """The device's doctor, None where it brings none, `Raised` where it cannot be imported."""
    name = getattr(device, "doctor", "")
    return attempt(lambda: importlib.import_module(name)) if name else None


def checks_of(device: Device) -> tuple[Check, ...]:
    """All checks of a device. One that raises is itself a finding; without a doctor there are none."""
    doctor = doctor_of(device)
    if doctor is None:
        return ()
    found = doctor if isinstance(doctor, Raised) else attempt(lambda: tuple(doctor.checks()))
    if isinstance(found, Raised):
        return (
            Check(
                part="doctor", status=WRONG, why=f"the checks of {device.name!r} raised {found}",
                fix="update the plugin, and report this: its checks must work on any host",
            ),
        )  # fmt: skip
    return found


def rows_of(device: Device) -> tuple[Row, ...]:
    """The tested rows of a device; none where it has no doctor or that one fails."""
    doctor = doctor_of(device)
    if doctor is None or isinstance(doctor, Raised):
        return ()
    found = attempt(lambda: tuple(doctor.rows()))
    return () if isinstance(found, Raised) else found


def pick_row(rows: Iterable[Row], name: str, device: str) -> Row:
    """The row called `name`, or the first for "". Raises `ConfigError` where there is none."""
    known = {row.name: row for row in rows}
    if not known:
        raise ConfigError(
            f"device {device!r} has no tested rows",
            why="its plugin names none",
            fix="follow the page of the plugin, or see `grpo doctor --matrix` for devices that have rows",
        )
    if name and name not in known:
        raise ConfigError(
            f"device {device!r} has no row {name!r}{did_you_mean(name, known)}",
            why=f"its rows: {', '.join(known)}",
            fix=f"see `grpo doctor --device {device} --matrix`",
        )
    return known[name] if name else next(iter(known.values()))


def row_check(rows: Iterable[Row], found: Mapping[str, str], device: str) -> Check:
    """Whether what is installed is a tested row.

    `found` holds versions by component; what a row does not name is not compared, and of a version with a
    local part ("2.10.0+cpu") only what stands before it.
    """
    best, same, other = None, -1, {}
    for row in rows:
        both = {key: value for key, value in row.versions.items() if key in found}
        differing = {key: value for key, value in both.items() if found[key].partition("+")[0] != value}
        if len(both) - len(differing) > same:
            best, same, other = row, len(both) - len(differing), differing
    if best is None or (not same and not other):
        return Check(part="tested row", status=UNKNOWN, why="nothing that a row names is installed")
    if not other:
        proof = f" ({best.proof})" if best.proof else ""
        return Check(part="tested row", status=OK, why=f"{best.name}{proof}: {best.basis}")
    wanted = ", ".join(f"{key} {value} ({found[key]} is here)" for key, value in other.items())
    return Check(
        part="tested row", status=ADVICE,
        why=f"none has these versions; the nearest, {best.name}, has {wanted}",
        fix=f"grpo doctor --device {device} --install-plan --row {best.name}",
    )  # fmt: skip
