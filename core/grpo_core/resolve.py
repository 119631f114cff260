"""Weighing offers against needs. Pure: nothing is imported, nothing is run, order does not matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from .errors import PlanError
from .impl import DeviceInfo, Need
from .ops.contract import CONTRACTS, Contract
from .plan import NONE, Choice, Passed, Plan, PluginVersion
from .plugin_checks import CACHE_OF, CACHES, did_you_mean
from .plugins import Catalogue, Offer, broken_plugins
from .requirements import unmet
from .weigh import ONLY_WITH_FALLBACK, is_fallback, refusal

NO_PINS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """All that resolution reads."""

    catalogue: Catalogue
    device: DeviceInfo
    needs: Mapping[str, tuple[Need, ...]]
    pins: Mapping[str, str]
    fallback: str
    contracts: Mapping[str, Contract]
    on_paper: bool = False


@dataclass(slots=True)
class _Weighed:
    """The offers for one op, each with its refusal; None is a fit."""

    op: str
    fits: list[Offer] = field(default_factory=list)
    refused: list[tuple[Offer, str]] = field(default_factory=list)


def resolve(
    needs: Iterable[Need],
    catalogue: Catalogue,
    device: DeviceInfo,
    *,
    pins: Mapping[str, str] = NO_PINS,
    fallback: str = NONE,
    contracts: Mapping[str, Contract] = CONTRACTS,
    on_paper: bool = False,
) -> Plan:
    """Choose an offer for every needed op; the same answer whatever the order of plugins or needs.

    `pins` maps an op to an offer id ("none" leaves an optional op out). `on_paper` plans for a device that is
    not here: what offers require counts as installed, and notes say what is not. Raises `PlanError` for a pin
    that cannot serve and for a required op that nothing serves, with the reasons.
    """
    grouped: dict[str, tuple[Need, ...]] = {}
    for need in needs:
        grouped[need.op] = (*grouped.get(need.op, ()), need)
    question = _Question(
        catalogue=catalogue,
        device=device,
        needs=grouped,
        pins=pins,
        fallback=fallback,
        contracts=contracts,
        on_paper=on_paper,
    )
    notes = _check_pins(question)
    choices: dict[str, Choice] = {}
    for op in sorted(grouped.keys() & CACHES.keys()):
        choices[op] = _choose_cache(question, op)
    for op in sorted(grouped.keys() - CACHES.keys()):
        cache = choices.get(CACHE_OF.get(op, ""))
        choices[op] = _choose(question, _weigh(question, op, cache.chosen if cache else None))
    for op in _covering(question, choices):
        for covered in contracts[op].covers:
            if covered in choices:
                row = choices[covered]
                choices[covered] = replace(row, covered_by=op, reason=f"covered by {op}; {row.reason}")
    _require(question, choices)
    if on_paper:
        notes += _lacking(question, choices)
    plugins = tuple(
        PluginVersion(id=plugin.id, distribution=plugin.distribution, version=plugin.version)
        for plugin in sorted(catalogue.plugins, key=lambda plugin: plugin.id)
    )
    return Plan(
        device=device,
        choices=tuple(choices[op] for op in sorted(choices)),
        plugins=plugins,
        fallback=fallback,
        notes=tuple(notes),
    )


def _lacking(question: _Question, choices: Mapping[str, Choice]) -> list[str]:
    """What a plan on paper takes as installed and is not here, one note for each requirement."""
    chosen = {row.chosen for row in choices.values() if row.chosen}
    offers = [offer for listed in question.catalogue.offers.values() for offer in listed]
    required = {one for offer in offers if offer.id in chosen for one in offer.impl.requires}
    return [f"on paper: {reason}" for reason in sorted(filter(None, map(unmet, required)))]


def _check_pins(question: _Question) -> list[str]:
    notes = []
    for op in sorted(question.pins):
        pin = question.pins[op]
        if op not in question.contracts:
            raise PlanError(
                f"ops.{op} is pinned, but there is no such op{did_you_mean(op, question.contracts)}",
                why=f"ops: {', '.join(sorted(question.contracts))}",
                fix="correct the name, or take the pin out",
            )
        if op not in question.needs:
            notes.append(f"pin ops.{op}: {pin} is not used, this model and config do not need the op")
        elif pin == NONE and any(need.required for need in question.needs[op]):
            raise PlanError(
                f"ops.{op} is pinned to none",
                why="the op is required; only optional ops can be left out",
                fix=f"pin one of: {_names(question.catalogue.offers.get(op, ()))}",
            )
    return notes


def _weigh(question: _Question, op: str, cache: str | None) -> _Weighed:
    """`cache` is the id of the cache that the op reads, if it reads one."""
    needs = question.needs[op]
    if cache is not None:
        needs = tuple(replace(need, facts={**need.facts, "cache": cache}) for need in needs)
    weighed = _Weighed(op)
    for offer in question.catalogue.offers.get(op, ()):
        reason = refusal(
            offer,
            needs,
            question.device,
            question.contracts[op],
            question.fallback,
            on_paper=question.on_paper,
        )
        reason = reason or _covers_a_pin(question, op)
        if reason is None:
            weighed.fits.append(offer)
        else:
            weighed.refused.append((offer, reason))
    weighed.fits.sort(key=lambda offer: (-offer.impl.rank, offer.id))
    return weighed


def _covers_a_pin(question: _Question, op: str) -> str | None:
    """A pin binds: an offer that would replace a pinned op is out, unless it is pinned itself."""
    if op in question.pins:
        return None
    for covered in question.contracts[op].covers:
        if covered in question.pins:
            return f"{covered}, which it covers, is pinned to {question.pins[covered]}"
    return None


def _choose_cache(question: _Question, op: str) -> Choice:
    """The best cache that all required readers can work with; a cache alone serves nobody."""
    weighed = _weigh(question, op, None)
    if op in question.pins:
        return _choose(question, weighed)
    for offer in list(weighed.fits):
        reason = _reader_refusal(question, offer)
        if reason:
            weighed.fits.remove(offer)
            weighed.refused.append((offer, reason))
    return _choose(question, weighed)


def _reader_refusal(question: _Question, cache: Offer) -> str | None:
    for op in CACHES[cache.impl.op]:
        needs = question.needs.get(op, ())
        pin = question.pins.get(op)
        if not any(need.required for need in needs) and pin in (None, NONE):
            continue
        readers = _weigh(question, op, cache.id)
        if pin is not None and not any(offer.id == pin for offer in readers.fits):
            return f"{op} is pinned to {pin}, which does not fit with this cache"
        if not readers.fits:
            return f"no offer of {op} fits with this cache"
    return None


def _choose(question: _Question, weighed: _Weighed) -> Choice:
    pin = question.pins.get(weighed.op)
    needs = question.needs[weighed.op]
    facts = tuple(dict(fact) for fact in _distinct(need.facts for need in needs))
    if pin is not None and pin != NONE:
        chosen: Offer | None = _pinned(question, weighed, pin)
    else:
        chosen = weighed.fits[0] if weighed.fits and pin is None else None
    passed = [Passed(id=offer.id, reason=reason, fits=False) for offer, reason in weighed.refused]
    passed += [
        Passed(id=offer.id, reason=_passed_reason(offer, chosen, pin), fits=True)
        for offer in weighed.fits
        if offer is not chosen
    ]
    passed.sort(key=lambda item: item.id)
    if chosen is None:
        reason = "pinned to none" if pin == NONE else "optional, nothing serves it"
        return Choice(op=weighed.op, chosen=None, load="", reason=reason, facts=facts,
                      passed=tuple(passed), pinned=pin == NONE)  # fmt: skip
    fallback = is_fallback(chosen, question.device)
    return Choice(
        op=weighed.op,
        chosen=chosen.id,
        load=chosen.impl.load,
        reason=_reason(chosen, weighed, pin, fallback) + _older(chosen, question.contracts[weighed.op]),
        rank=chosen.impl.rank,
        contract=chosen.impl.contract,
        pinned=pin is not None,
        fallback=fallback,
        facts=facts,
        passed=tuple(passed),
    )


def _reason(chosen: Offer, weighed: _Weighed, pin: str | None, fallback: bool) -> str:
    if pin is not None:
        reason = "pinned"
    else:
        others = len(weighed.fits) - 1
        reason = f"rank {chosen.impl.rank}" + (
            "" if not others else ", 1 other fits" if others == 1 else f", {others} others fit"
        )
    return reason + (", FALLBACK allowed by fallback: reference" if fallback else "")


def _older(chosen: Offer, contract: Contract) -> str:
    """What an offer of an earlier version is not told."""
    written = chosen.impl.contract
    missed = [name for name, (version, _) in contract.added.items() if version > written]
    return f", written for contract {written}: without {', '.join(missed)}" if missed else ""


def _passed_reason(offer: Offer, chosen: Offer | None, pin: str | None) -> str:
    if pin is not None or chosen is None:
        return f"fits, rank {offer.impl.rank}; {pin} is pinned"
    if offer.impl.rank == chosen.impl.rank:
        return f"fits, rank {offer.impl.rank} as {chosen.id}, which comes first by id"
    return f"fits, rank {offer.impl.rank} below {chosen.impl.rank}"


def _pinned(question: _Question, weighed: _Weighed, pin: str) -> Offer:
    for offer in weighed.fits:
        if offer.id == pin:
            return offer
    refused = {offer.id: reason for offer, reason in weighed.refused}
    why = refused.get(pin)
    if why is None:
        known = [offer.id for offer in question.catalogue.offers.get(weighed.op, ())]
        why = f"there is no such offer{did_you_mean(pin, known)}{_broken(question)}"
    raise PlanError(
        f"ops.{weighed.op} is pinned to {pin}, which cannot serve it",
        why=why,
        fix=f"take the pin out, or pin one that fits: {_names(weighed.fits)}",
    )


def _covering(question: _Question, choices: Mapping[str, Choice]) -> list[str]:
    return [op for op, row in sorted(choices.items()) if row.chosen and question.contracts[op].covers]


def _require(question: _Question, choices: Mapping[str, Choice]) -> None:
    """Stop on the first required op without an offer, unless the op is covered by a chosen one."""
    order = sorted(choices, key=lambda op: (op not in CACHES, op))
    for op in order:
        row = choices[op]
        if row.chosen or row.covered_by or not any(need.required for need in question.needs[op]):
            continue
        blocked = [item for item in row.passed if item.reason.endswith(ONLY_WITH_FALLBACK)]
        reasons = "; ".join(f"{item.id}: {item.reason}" for item in row.passed) or "no plugin offers it"
        asked = " and ".join(", ".join(f"{k}={v}" for k, v in facts.items()) for facts in row.facts)
        fix = f"install or update a plugin for {question.device.type}, or change what is asked ({asked})"
        if blocked:
            fix = f"add the line `fallback: reference` to the config to let {blocked[0].id} serve it"
        raise PlanError(
            f"nothing serves {op} on {question.device.type}", why=reasons + _broken(question), fix=fix
        )


def _broken(question: _Question) -> str:
    broken = broken_plugins(question.catalogue)
    return f"; broken plugins: {broken}" if broken else ""


def _names(offers: Iterable[Offer]) -> str:
    return ", ".join(offer.id for offer in offers) or "none"


def _distinct(facts: Iterable[Mapping[str, object]]) -> list[Mapping[str, object]]:
    found: list[Mapping[str, object]] = []
    for fact in facts:
        if fact not in found:
            found.append(fact)
    return found


def replay(
    earlier: Plan,
    needs: Iterable[Need],
    catalogue: Catalogue,
    device: DeviceInfo,
    *,
    pins: Mapping[str, str] = NO_PINS,
    contracts: Mapping[str, Contract] = CONTRACTS,
) -> Plan:
    """Resolve with every choice of an earlier plan pinned.

    Raises `PlanError` when a choice no longer survives, or when a pin of the config says otherwise.
    Ops that the earlier plan did not have are resolved afresh; they and changed plugin versions are notes.
    """
    listed = list(needs)
    needed = {need.op for need in listed}
    # A covered op without an offer of its own stays free: the pin of the covering op decides.
    rows = [row for row in earlier.choices if row.op in needed and (row.chosen or not row.covered_by)]
    fixed = {row.op: row.chosen or NONE for row in rows}
    for op, pin in pins.items():
        if fixed.get(op, pin) != pin:
            raise PlanError(
                f"ops.{op} is pinned to {pin} in the config and to {fixed[op]} by the plan",
                why=f"plan {earlier.id} is replayed, so both bind",
                fix="take one of them out",
            )
    plan = resolve(
        listed,
        catalogue,
        device,
        pins={**pins, **fixed},
        fallback=earlier.fallback,
        contracts=contracts,
    )
    versions = {row.id: row.version for row in earlier.plugins}
    used = {row.chosen.partition(":")[0] for row in plan.choices if row.chosen}
    notes = [f"replays plan {earlier.id}"]
    known = {row.op for row in earlier.choices}
    notes += [f"{op} is new since plan {earlier.id}" for op in sorted(needed - known)]
    notes += [
        f"plugin {row.id} is {row.version}, it was {versions.get(row.id, 'absent')}"
        for row in plan.plugins
        if row.id in used and versions.get(row.id) != row.version
    ]
    return replace(plan, notes=(*plan.notes, *notes))
