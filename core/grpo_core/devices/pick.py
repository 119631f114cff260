"""Choosing the device of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigError, PluginError
from ..impl import DeviceInfo
from ..plugin_checks import did_you_mean
from ..plugins import Raised, attempt, broken_plugins
from .base import Device, Probe

if TYPE_CHECKING:
    from ..catalogue import Catalogue

AUTO = "auto"
HOST = "cpu"
SIMULATED = "simulated"
"""Feature of a device that is no hardware: it runs only where it is asked for by name."""


def probe(device: Device) -> Probe:
    """What a device's probe says; one that raises counts as not found, with that reason."""
    said = attempt(device.probe)
    if isinstance(said, Probe):
        return said
    reason = (
        f"its probe raised {said}"
        if isinstance(said, Raised)
        else f"its probe returned {said!r}, not a Probe"
    )
    return Probe(found=False, reason=reason, info=DeviceInfo(type=device.type))


def pick_device(name: str, catalogue: Catalogue, *, absent: bool = False) -> tuple[Device, DeviceInfo]:
    """The device called `name`, or else of that torch type; "auto" is the best found one, else the CPU.

    The best has the most memory over all its devices, simulated ones passed over; ties go to the first by
    name. Raises `ConfigError` for an unknown name and `PluginError` for a device that is not here, listing
    what is; with `absent` a known one that is not here is returned as its plugin describes it (count 0).
    """
    if name == AUTO:
        return _best(catalogue)
    probes = [(device, probe(device)) for device in _matching(name, catalogue)]
    for device, said in probes:
        if said.found:
            return device, said.info
    if absent:
        return probes[0][0], probes[0][1].info
    raise PluginError(
        f"device {name!r} was asked for but is not here",
        why="; ".join(said.reason for _, said in probes) + f". Found: {_found(catalogue)}",
        fix=f"set device to one that was found, or to auto; see `grpo doctor --device {name}`",
    )


def known_device(name: str, catalogue: Catalogue) -> Device:
    """The device called `name` (or of that torch type, or the best for "auto"), here or not.

    Raises `ConfigError` for an unknown name.
    """
    return pick_device(name, catalogue, absent=True)[0]


def _matching(name: str, catalogue: Catalogue) -> list[Device]:
    named = catalogue.devices.get(name)
    matching = [named] if named else [one for one in catalogue.devices.values() if one.type == name]
    if matching:
        return matching
    known = sorted(catalogue.devices)
    broken = broken_plugins(catalogue)
    raise ConfigError(
        f"there is no device {name!r}{did_you_mean(name, [AUTO, *known])}",
        why=f"installed plugins know {', '.join(known)}" + (f"; broken: {broken}" if broken else ""),
        fix=f"set device to auto or one of {', '.join(known)}, or install a plugin for {name!r}",
    )


def _best(catalogue: Catalogue) -> tuple[Device, DeviceInfo]:
    found = []
    for _, device in sorted(catalogue.devices.items()):
        said = probe(device)
        if said.found and device.type != HOST and SIMULATED not in said.info.features:
            found.append((device, said.info))
    if found:
        return max(found, key=lambda pair: pair[1].count * pair[1].memory_bytes)
    return pick_device(HOST, catalogue)


def _found(catalogue: Catalogue) -> str:
    probes = {name: probe(device) for name, device in sorted(catalogue.devices.items())}
    return ", ".join(f"{name} ({said.info.name})" for name, said in probes.items() if said.found) or "none"
