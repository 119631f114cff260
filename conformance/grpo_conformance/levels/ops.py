"""Level 2: every offered op against float64, over the sizes that the offer declares."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo_core.backend import import_pointer
from grpo_core.catalogue import Offer
from grpo_core.impl import DeviceInfo
from grpo_core.ops.contract import CONTRACTS

from ..case import Case, Outcome, Target, failed, passed
from ..ops.facts import ends, refused, usual
from ..ops.family import Family
from ..ops.table import FAMILIES

WHOLE_DTYPES = 2
"""The first dtypes that an offer takes are asked about every shape, and are all that a quick run asks."""
FLAGS = "grpo_conformance.ops.flags"
OUTSIDE = "a value that is not declared"
LARGE = "above 2^16 elements"
"""A quick run asks it in the first dtype alone: it takes as long as all other shapes, and sizes that are
counted wrong are so in every dtype."""
THREADED = (LARGE,)
"""Shapes that an offer computes with all threads of the host. Others are too small to share out, and threads
that wait for one another make them a hundred times slower where something else runs beside the suite."""


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """One case for each offer, dtype and named shape, offer by offer; and two of what offers declare."""
    offers = [offer for op, row in target.offers.items() if op in FAMILIES for offer in row]
    order = {op: place for place, op in enumerate(CONTRACTS)}
    offers.sort(key=lambda one: (one.id, order[one.impl.op]))
    for _, row in itertools.groupby(offers, key=lambda one: one.id):
        found = [case for offer in row for case in _of_offer(offer, target.probe.info, quick)]
        # Those that share another room come last, so that no room is left twice.
        yield from sorted(found, key=lambda case: case.fragile)


def _of_offer(offer: Offer, info: DeviceInfo, quick: bool) -> Iterator[Case]:
    op, family = offer.impl.op, FAMILIES[offer.impl.op]
    base = {"op": op, "offer_id": offer.id}
    served = 0
    reason = ""
    for dtype in (name for name in family.dtypes if name in info.dtypes):
        if quick and served == WHOLE_DTYPES:
            break
        fixed: dict[str, Any] = {family.dtype_fact: (dtype,), **_caches(offer)}
        facts = usual(offer, info, {**fixed, **family.axes})
        if isinstance(facts, str):
            reason = reason or facts
            continue
        served += 1
        for shape, sizes in _shapes(offer, info, family, facts, quick or served > WHOLE_DTYPES):
            if quick and served > 1 and shape == LARGE:
                continue
            args = {**base, "dtype": dtype, "shape": shape, "facts": sizes}
            yield _case(offer, f"{dtype}/{shape}", "answers", args)
        if served <= (1 if quick else WHOLE_DTYPES):
            yield from _flags(offer, {**base, "dtype": dtype, "facts": facts})
    if served:
        yield _case(offer, "limits", "limits", base)
    else:
        yield _case(offer, "served", "not_served", {**base, "reason": reason})


def _shapes(
    offer: Offer, info: DeviceInfo, family: Family, facts: Mapping[str, Any], few: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    for shape, changes in family.shapes.items():
        sizes = {**facts, **changes}
        if shape in family.trained and not offer.impl.backward:
            continue
        if offer.impl.contract < family.since.get(shape, 0):
            continue
        if (shape in family.quick or not few) and refused(offer, info, sizes) is None:
            yield shape, sizes
    if few:
        return
    for what, (names, span) in family.ends.items():
        found = ends(offer, info, facts, names, span)
        for word, sizes in zip(("least", "most"), found, strict=False):
            yield f"{word} {what}", sizes
        yield from _single_ends(offer, info, facts, names, span, found)


def _single_ends(
    offer: Offer, info: DeviceInfo, facts: Mapping[str, Any], names: Sequence[str], span: tuple[int, int],
    found: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Ends of one size that no size has together with the others."""
    for name in names if len(names) > 1 else ():
        together = [sizes[name] for sizes in found]
        for word, sizes in zip(("least", "most"), ends(offer, info, facts, (name,), span), strict=False):
            if not together or not min(together) <= sizes[name] <= max(together):
                yield f"{word} {name.replace('_', ' ')} alone", sizes


def _flags(offer: Offer, args: Mapping[str, Any]) -> Iterator[Case]:
    """One case for each flag that an offer declares besides `backward` and `deterministic`, which every case
    asks about."""
    impl, dtype = offer.impl, args["dtype"]
    if impl.batch_invariant:
        yield _case(offer, f"{dtype}/batch-invariant", f"{FLAGS}:batch_invariant", args)
    if impl.graph and CONTRACTS[impl.op].kind == "function":
        yield _case(offer, f"{dtype}/graph", f"{FLAGS}:graph", args, fragile=True)


def _case(offer: Offer, name: str, check: str, args: Mapping[str, Any], *, fragile: bool = False) -> Case:
    op = offer.impl.op
    return Case(
        id=f"ops/{op}/{offer.id}/{name}".replace(" ", "-"),
        level=2,
        subject=f"{op} {offer.id}",
        run=check if ":" in check else f"{__name__}:{check}",
        args=args,
        # A capture that goes wrong can leave the device in any state.
        room=f"{offer.id} graphs" if fragile else offer.id,
        fragile=fragile,
    )


def answers(
    target: Target, *, op: str, offer_id: str, dtype: str, shape: str, facts: Mapping[str, Any], draw: int = 0
) -> Outcome:
    """The questions of one named shape; another `draw` asks them with other values."""
    import torch

    from ..ops.question import drawn

    threads = torch.get_num_threads()
    offer = _offer(target, op, offer_id)
    torch.set_num_threads(1)
    try:
        many = threads if shape in THREADED and offer.impl.rank > 0 else 1
        with drawn(draw):
            return _asked(target, offer, dtype, shape, facts, many)
    finally:
        torch.set_num_threads(threads)


def _asked(
    target: Target, offer: Offer, dtype: str, shape: str, facts: Mapping[str, Any], threads: int
) -> Outcome:
    from ..ops.examine import Terms, examine

    impl, family = offer.impl, FAMILIES[offer.impl.op]
    if family.questions is None:
        asked: Outcome = import_pointer(family.check)(target, offer, dtype=dtype, shape=shape, facts=facts)
        return asked
    reference = CONTRACTS[impl.op].reference
    terms = Terms(
        device=target.device.open(0), backward=impl.backward, deterministic=impl.deterministic,
        float64="float64" in target.probe.info.dtypes, threads=threads,
    )  # fmt: skip
    implementation = import_pointer(impl.load)
    if family.partner:
        implementation = (import_pointer(_partner(target, family.partner, offer).impl.load), implementation)
    return examine(
        implementation,
        family.questions(impl.op, shape, facts, dtype),
        import_pointer(reference) if reference else None,
        terms,
    )


def limits(target: Target, *, op: str, offer_id: str) -> Outcome:
    """The plan refuses what lies outside of each declared limit, and what the flags do not promise."""
    offer, family, info = _offer(target, op, offer_id), FAMILIES[op], target.probe.info
    for dtype in family.dtypes:
        facts = usual(offer, info, {family.dtype_fact: (dtype,), **_caches(offer), **family.axes})
        if not isinstance(facts, str):
            break
    else:
        return failed("no usual sizes are served")
    for name in offer.impl.limits:
        if name not in facts:
            return failed(f"limits[{name!r}] is no fact of {op}, so that every need is refused")
        if refused(offer, info, {**facts, name: OUTSIDE}) is None:
            return failed(f"limits[{name!r}] allows {OUTSIDE!r}")
    if not offer.impl.backward and refused(offer, info, facts, backward=True) is None:
        return failed("a need of gradients is served without `backward`")
    return passed()


def not_served(target: Target, *, op: str, offer_id: str, reason: str) -> Outcome:
    """Nothing that the suite asks is served here."""
    return Outcome(status="not_declared", message=reason)


def _partner(target: Target, op: str, offer: Offer) -> Offer:
    """The offer of the same name, or else the best of the same plugin's, or of all."""
    rows = sorted(target.offers[op], key=lambda one: (one.id == offer.id, one.plugin == offer.plugin,
                                                      one.impl.rank))  # fmt: skip
    return rows[-1]


def _caches(offer: Offer) -> dict[str, tuple[str, ...]]:
    cache = offer.impl.limits.get("cache")
    return {"cache": tuple(sorted(map(str, cache)))} if isinstance(cache, Iterable) else {}


def _offer(target: Target, op: str, offer_id: str) -> Offer:
    return next(offer for offer in target.offers[op] if offer.id == offer_id)
