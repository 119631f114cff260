"""Level 6, informative: what each offer achieves beside a copy and a product measured on the spot.

Nothing fails here for being slow; an offer that raises at sizes which it declares is an error as elsewhere.
Bytes and FLOPs are counted by formula (see `grpo_conformance.speed.work` and the functions beside it). On the
host and on a simulated device sizes are those of a small model, on an accelerator those of a large one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from grpo_core.catalogue import Offer
from grpo_core.impl import DeviceInfo
from grpo_core.ops.contract import CONTRACTS

from ..case import Case, Outcome, Target
from ..ops.facts import usual
from ..ops.table import FAMILIES
from ..speed.clock import QUICK, USUAL
from ..speed.measure import is_large, measure, refusal, sizes_of
from ..speed.table import LOADS

LEVEL = 6
TIMEOUT = 120.0


def cases(target: Target, *, quick: bool) -> Iterable[Case]:
    """One case an offer, in the first dtype that it takes: the device's fast one, then the others."""
    order = {op: place for place, op in enumerate(CONTRACTS)}
    offers = [offer for op, row in target.offers.items() if op in LOADS for offer in row]
    for offer in sorted(offers, key=lambda one: (one.id, order[one.impl.op])):
        yield from _of_offer(target, offer, quick)


def dtypes_of(op: str, info: DeviceInfo) -> list[str]:
    """Dtypes to try, the one that a run would choose first."""
    first = "bfloat16" if "fast_bf16" in info.features else "float32"
    family = FAMILIES[op]
    return sorted((name for name in family.dtypes if name in info.dtypes), key=lambda name: name != first)


def _of_offer(target: Target, offer: Offer, quick: bool) -> Iterator[Case]:
    op, reason = offer.impl.op, ""
    for dtype in dtypes_of(op, target.probe.info):
        sizes = _served(target, offer, sizes_of(op, quick=quick, large=is_large(target)), dtype)
        if not isinstance(sizes, str):
            args = {"op": op, "offer_id": offer.id, "dtype": dtype, "sizes": sizes, "quick": quick}
            yield _case(offer, dtype, "speed", args)
            return
        reason = reason or sizes
    yield _case(offer, "served", "not_served", {"reason": reason})


def _served(target: Target, offer: Offer, sizes: dict[str, Any], dtype: str) -> dict[str, Any] | str:
    """The sizes, those that the offer does not take replaced by some that it takes; or why there are none."""
    why = refusal(target, offer, sizes, dtype, backward=False)
    if why is None:
        return sizes
    family = FAMILIES[offer.impl.op]
    cache = offer.impl.limits.get("cache")
    fixed: dict[str, tuple[str, ...]] = (
        {"cache": tuple(sorted(map(str, cache)))} if isinstance(cache, Iterable) else {}
    )
    axes = {name: (sizes[name], *tried) for name, tried in family.axes.items()}
    facts = usual(offer, target.probe.info, {**fixed, **axes, family.dtype_fact: (dtype,)})
    if isinstance(facts, str):
        return why
    others = {**sizes, **{name: facts[name] for name in family.axes}}
    return others if refusal(target, offer, others, dtype, backward=False) is None else why


def _case(offer: Offer, name: str, check: str, args: Mapping[str, Any]) -> Case:
    op = offer.impl.op
    return Case(
        id=f"speed/{op}/{offer.id}/{name}",
        level=LEVEL,
        subject=f"{op} {offer.id}",
        run=f"{__name__}:{check}",
        args=args,
        timeout=TIMEOUT,
        room=offer.plugin,
    )


def speed(
    target: Target, *, op: str, offer_id: str, dtype: str, sizes: Mapping[str, Any], quick: bool,
    backward: bool = False,
) -> Outcome:  # fmt: skip
    """The figures of one offer."""
    offer = next(one for one in target.offers[op] if one.id == offer_id)
    return measure(target, offer, sizes, dtype, QUICK if quick else USUAL, backward=backward)


def not_served(target: Target, *, reason: str) -> Outcome:
    """Nothing that is timed is served here."""
    return Outcome(status="not_declared", message=reason)
