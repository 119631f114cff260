"""Checks of what an offer promises beyond its numbers: `batch_invariant` and `graph`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_core.backend import import_pointer
from grpo_core.catalogue import Offer
from grpo_core.devices.graphs import FEATURE
from grpo_core.plugin_checks import CACHE_OF, CACHES
from grpo_core.plugins import Raised, attempt

from ..case import Outcome, Target, failed, passed
from .alone_experts import KINDS as EXPERTS
from .alone_kinds import KINDS as PLAIN
from .buffers import bits
from .capture import Graphs, graphs_of
from .facts import Facts, refused
from .question import DTYPES, laid_out
from .tolerance import roundoff

KINDS = {**PLAIN, **EXPERTS}


def batch_invariant(
    target: Target, *, op: str, offer_id: str, dtype: str, facts: Mapping[str, Any]
) -> Outcome:
    """A sequence has the same bits alone and in batches, wherever it stands, however it is cut into calls."""
    offer = next(one for one in target.offers[op] if one.id == offer_id)
    told = (_plain if op in KINDS else _cached)(target, offer, dtype, facts)
    if told is None:
        reason = "no offer that reads this cache declares to be batch-invariant"
        return Outcome(status="not_declared", message=reason)
    return failed(told, worst={"dtype": dtype, "facts": dict(facts)}) if told else passed()


def _plain(target: Target, offer: Offer, dtype: str, facts: Facts) -> str | None:
    from ..speed.measure import parts_of
    from .alone import first_difference

    float64 = "float64" in target.probe.info.dtypes
    parts = parts_of(target, offer, facts)
    asked = {**facts, "float64": float64}
    return first_difference(KINDS[offer.impl.op], parts, asked, DTYPES[dtype], target.device.open(0))


def _cached(target: Target, offer: Offer, dtype: str, facts: Facts) -> str | None:
    """None where a cache has nothing to be read with."""
    from .alone_cached import first_difference
    from .caches import kit_of

    op, info = offer.impl.op, target.probe.info
    cache_op = CACHE_OF.get(op, op)
    caches = [one for one in target.offers[cache_op] if one.id in (facts.get("cache"), offer.id)]
    if op == cache_op:
        caches = [offer]
    if not caches:
        return f"the cache {facts.get('cache')} that it reads is not here"
    asked = {**facts, "cache": caches[0].id}
    found: list[Offer] = []
    for reader in (op,) if op in CACHE_OF else CACHES[op]:
        able = [one for one in target.offers.get(reader, ()) if one.impl.batch_invariant
                and (op == cache_op or one.id == offer.id) and refused(one, info, asked) is None
                # Only those of one plugin promise to agree with each other.
                and (not found or one.plugin == found[0].plugin)]  # fmt: skip
        found += sorted(able, key=lambda one: -one.impl.rank)[:1]
    if not found:
        return None
    readers = {one.impl.op.partition(".")[2]: import_pointer(one.impl.load) for one in found}
    if len(readers) > 1:
        readers.pop("step", None)
    kit = kit_of(cache_op, facts, DTYPES[dtype])
    return first_difference(import_pointer(caches[0].impl.load), readers, kit, target.device.open(0))


def graph(target: Target, *, op: str, offer_id: str, dtype: str, facts: Mapping[str, Any]) -> Outcome:
    """A captured call, replayed on new inputs, gives what a plain call gives on them."""
    if FEATURE not in target.probe.info.features:
        return Outcome(status="not_declared", message=f"{target.device.name} has no feature {FEATURE!r}")
    # A vendor's package gives torch the module that has the graphs.
    target.device.open(0)
    graphs = graphs_of(target.device.type)
    if isinstance(graphs, str):
        return Outcome(status="not_declared", message=graphs)
    offer = next(one for one in target.offers[op] if one.id == offer_id)
    return replayed(graphs, target, offer, dtype, facts)


def replayed(graphs: Graphs, target: Target, offer: Offer, dtype: str, facts: Facts) -> Outcome:
    """The same for given graphs: bits where the offer declares determinism, else half of the digits."""
    from ..speed.measure import on_device, parts_of, sizes_of
    from ..speed.table import LOADS

    op, place = offer.impl.op, target.device.open(0)
    sizes = {**sizes_of(op, quick=True, large=False), **facts}
    work = LOADS[op].make(sizes, DTYPES[dtype])
    parts, float64 = parts_of(target, offer, facts), "float64" in target.probe.info.dtypes
    inputs = {"dtype": dtype, **{name: sizes[name] for name in sorted(sizes)}}
    with torch.no_grad():
        static = on_device(work, place, float64=float64, seed=1)
        call = work.prepare(parts, static)
        captured = attempt(lambda: graphs.capture(call))
        if isinstance(captured, Raised):
            return failed(f"it cannot be captured: {captured}", worst=inputs)
        returned, replay = captured
        fresh = on_device(work, place, float64=float64, seed=2)
        for name, x in fresh.items():
            static[name].copy_(x)
        replay()
        target.device.synchronize()
        expected = work.prepare(parts, fresh)()
        target.device.synchronize()
    got = {f"result {i}": x for i, x in enumerate(_tensors(returned))} | static
    wanted = {f"result {i}": x for i, x in enumerate(_tensors(expected))} | fresh
    for name, x in wanted.items():
        told = _unlike(got[name].cpu(), x.cpu(), DTYPES[dtype], exact=offer.impl.deterministic)
        if told:
            return failed(f"{name} of a replay on new inputs: {told}", worst=inputs)
    return passed()


def _tensors(returned: Any) -> list[Tensor]:
    return [x for x in laid_out(returned) if isinstance(x, Tensor)]


def _unlike(got: Tensor, wanted: Tensor, dtype: torch.dtype, *, exact: bool) -> str:
    if got.shape != wanted.shape:
        return f"the shape {list(got.shape)}, not {list(wanted.shape)}"
    if exact or not wanted.is_floating_point():
        return "" if torch.equal(bits(got), bits(wanted)) else "other bits than a plain call gives"
    if not wanted.numel():
        return ""
    error, scale = float((got.double() - wanted.double()).abs().max()), float(wanted.double().abs().max())
    tolerance = math.sqrt(roundoff(dtype)) * scale
    return "" if error <= tolerance else f"error {error:.3g} above {tolerance:.3g}"
