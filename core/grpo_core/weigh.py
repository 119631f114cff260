"""One offer against the needs of one op: the reason to refuse it, or none."""

from __future__ import annotations

from collections.abc import Container, Sequence

from .catalogue import Offer
from .impl import DeviceInfo, Impl, Need
from .ops.contract import Contract
from .plugin_checks import did_you_mean
from .plugins import Raised, attempt
from .requirements import unmet

ALLOW_REFERENCE = "reference"
"""Value of `fallback` that lets a reference serve a device other than cpu."""
ONLY_WITH_FALLBACK = "only with fallback: reference"


def refusal(
    offer: Offer,
    needs: Sequence[Need],
    device: DeviceInfo,
    contract: Contract,
    fallback: str,
    *,
    on_paper: bool = False,
) -> str | None:
    """Why an offer cannot serve all the needs of one op on a device, or None when it can.

    `on_paper` takes what it requires as installed: the plan is for another machine than this one.
    """
    impl = offer.impl
    if impl.device not in ("*", device.type):
        return f"for {impl.device}, not {device.type}"
    if impl.contract > contract.version:
        return f"written for contract {impl.contract}, this core has {contract.version}: update grpo-core"
    if impl.contract < contract.oldest:
        return (
            f"written for contract {impl.contract}, the oldest served is {contract.oldest}: update the plugin"
        )
    for requirement in () if on_paper else impl.requires:
        reason = unmet(requirement)
        if reason:
            return reason
    for need in needs:
        reason = _need_refusal(offer, need, device, contract)
        if reason:
            return reason
    if is_fallback(offer, device) and fallback != ALLOW_REFERENCE:
        return f"the reference serves {device.type} {ONLY_WITH_FALLBACK}"
    return None


def is_fallback(offer: Offer, device: DeviceInfo) -> bool:
    """Whether the offer is a reference (rank 0) on a device that is owed better."""
    return offer.impl.rank == 0 and device.type != "cpu"


def _need_refusal(offer: Offer, need: Need, device: DeviceInfo, contract: Contract) -> str | None:
    impl = offer.impl
    for flag in ("backward", "graph", "deterministic", "batch_invariant"):
        if getattr(need, flag) and not getattr(impl, flag):
            return f"does not offer {flag}"
    for name, (version, neutral) in contract.added.items():
        if impl.contract < version and need.facts.get(name, neutral) != neutral:
            return f"written for contract {impl.contract}, without {name}; {name}={need.facts[name]} is asked"
    for name, allowed in impl.limits.items():
        reason = _limit_refusal(name, allowed, need)
        if reason:
            return reason
    return _objection(impl, device, need)


def _limit_refusal(name: str, allowed: Container[object], need: Need) -> str | None:
    if name not in need.facts:
        return f"limits {name!r}, which no need of {need.op} states{did_you_mean(name, need.facts)}"
    value = need.facts[name]
    held = attempt(lambda: value in allowed)
    if isinstance(held, Raised):
        return f"limits[{name!r}] raised on {value!r}: {held}"
    return None if held else f"{name}={value} not in {_spell(allowed)}"


def _objection(impl: Impl, device: DeviceInfo, need: Need) -> str | None:
    when = impl.when
    if when is None:
        return None
    said: object = attempt(lambda: when(device, need))
    if isinstance(said, Raised):
        return f"its `when` raised {said}"
    if said is None or (isinstance(said, str) and said):
        return said
    return f"its `when` returned {said!r}; it must return a reason or None"


def _spell(allowed: Container[object]) -> str:
    if isinstance(allowed, set | frozenset | tuple | list):
        return "{" + ", ".join(map(str, sorted(allowed, key=_order))) + "}"
    return str(allowed)


def _order(value: object) -> tuple[bool, float, str]:
    """Numbers by size, then the rest as text."""
    if isinstance(value, int | float):
        return (False, float(value), "")
    return (True, 0.0, str(value))
