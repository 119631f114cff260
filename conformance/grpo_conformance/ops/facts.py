"""Sizes that an offer says it takes: a usual one, and both ends of every declared limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_core.catalogue import Offer
from grpo_core.impl import DeviceInfo, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.weigh import ALLOW_REFERENCE, refusal

Facts = Mapping[str, Any]
LARGEST = 512
"""No size above it is tried where an offer's limits name none; a declared end is tried up to `REACH`."""
REACH = 1 << 15


def refused(offer: Offer, info: DeviceInfo, facts: Facts, *, backward: bool | None = None) -> str | None:
    """Why the plan would not let an offer serve these facts, with all the flags that it declares."""
    impl = offer.impl
    need = Need(
        op=impl.op,
        facts=facts,
        backward=impl.backward if backward is None else backward,
        graph=impl.graph,
        deterministic=impl.deterministic,
        batch_invariant=impl.batch_invariant,
    )
    return refusal(offer, [need], info, CONTRACTS[impl.op], ALLOW_REFERENCE)


def usual(offer: Offer, info: DeviceInfo, axes: Mapping[str, Sequence[Any]]) -> dict[str, Any] | str:
    """The first combination of the axes' values that is served, or the reason of the first refusal."""
    reason = ""
    for values in itertools.product(*(_reachable(offer, name, tried) for name, tried in axes.items())):
        facts = dict(zip(axes, values, strict=True))
        why = refused(offer, info, facts)
        if why is None:
            return facts
        reason = reason or why
    return reason or "none of its limits can be met"


def ends(
    offer: Offer, info: DeviceInfo, facts: Facts, names: Sequence[str], span: tuple[int, int]
) -> tuple[dict[str, Any], ...]:
    """Facts with the sizes `names`, all equal, at the least and at the most that is served within a span.

    What an offer declares goes beyond the span where its limits can be counted.
    """
    sizes = set(range(span[0], span[1] + 1))
    for name in names:
        declared = counted(offer.impl.limits.get(name))
        if declared:
            sizes = {size for size in declared if size <= REACH}
    found = []
    for order in (sorted(sizes), sorted(sizes, reverse=True)):
        changed = ({**facts, **dict.fromkeys(names, size)} for size in order)
        found += list(itertools.islice((one for one in changed if refused(offer, info, one) is None), 1))
    return tuple(found)


def counted(allowed: object) -> list[int]:
    """The numbers of a limit that can be listed; nothing for others."""
    if not isinstance(allowed, Iterable):
        return []
    listed = itertools.islice(allowed, 1 << 16)
    return sorted({value for value in listed if isinstance(value, int) and not isinstance(value, bool)})


def _reachable(offer: Offer, name: str, tried: Sequence[Any]) -> list[Any]:
    """The values to try, and the declared ones near to them that nobody thought of."""
    declared = counted(offer.impl.limits.get(name))
    near = sorted(declared, key=lambda size: abs(size - tried[0]))[:3] if declared else []
    return [*tried, *(size for size in near if size not in tried)]
