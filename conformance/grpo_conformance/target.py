"""The device under test with what the installed plugins offer for it."""

from __future__ import annotations

from grpo_core.catalogue import Catalogue, Offer
from grpo_core.devices.pick import pick_device, probe
from grpo_core.plugins import load
from grpo_core.requirements import unmet

from .cann.limits import LIMITS as CANN_LIMITS
from .case import Target

SIMULATED = "simulated"
"""A feature of devices that are not hardware; reports carry it as a flag."""
LIMITS: dict[str, tuple[str, ...]] = {"npu": CANN_LIMITS}
"""By torch type: what a simulation of it cannot tell."""


def open_target(name: str, catalogue: Catalogue | None = None) -> Target:
    """The target called `name`, a device's key. Nothing of the vendor's is imported.

    Raises `ConfigError` for a name that no plugin knows and `PluginError` for a device that is not here.
    """
    catalogue = load() if catalogue is None else catalogue
    device, info = pick_device(name, catalogue)
    offers = {op: tuple(o for o in row if _serves(o, info.type)) for op, row in catalogue.offers.items()}
    return Target(device=device, probe=probe(device), catalogue=catalogue, offers=offers)


def is_simulated(target: Target) -> bool:
    """Whether the device says that it is not hardware."""
    return SIMULATED in target.probe.info.features


def limits(target: Target) -> tuple[str, ...]:
    """What a simulated device cannot tell; nothing for hardware."""
    return LIMITS.get(target.probe.info.type, ()) if is_simulated(target) else ()


def _serves(offer: Offer, type: str) -> bool:
    """Engines are judged as a whole by the system level, not as ops."""
    impl = offer.impl
    if impl.device not in ("*", type) or impl.op.startswith("engine."):
        return False
    return not any(unmet(requirement) for requirement in impl.requires)
