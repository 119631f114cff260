"""One offer, timed: the sizes that it is asked, the call, and the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from grpo_core.backend import adapt, import_pointer
from grpo_core.catalogue import Offer
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Choice
from grpo_core.plugin_checks import CACHE_OF

from ..case import Outcome, Target, passed
from ..ops.facts import refused
from ..ops.question import DTYPES
from ..ops.table import FAMILIES
from ..target import is_simulated
from .clock import Best, Patience, best_of, seconds_of
from .table import LOADS
from .work import Sizes, Tensors, Work


def is_large(target: Target) -> bool:
    """Whether the device gets the sizes of an accelerator."""
    return target.device.type != "cpu" and not is_simulated(target)


def sizes_of(op: str, *, quick: bool, large: bool) -> dict[str, Any]:
    """The sizes of an op on a kind of device."""
    load = LOADS[op]
    return {**load.sizes, **(load.quick if quick else load.large if large else {})}


def facts_of(op: str, sizes: Sizes, dtype: str) -> dict[str, Any]:
    """What the plan would weigh."""
    family = FAMILIES[op]
    return {**{name: sizes[name] for name in family.axes}, family.dtype_fact: dtype}


def cache_of(target: Target, offer: Offer, facts: Mapping[str, Any]) -> Offer | None:
    """The best cache that an offer says it reads and that takes these sizes; None where there is none."""
    named = offer.impl.limits.get("cache")
    known = set(map(str, named)) if isinstance(named, Iterable) else set[str]()
    rows = target.offers.get(CACHE_OF[offer.impl.op], ())
    able = [one for one in rows if one.id in known and refused(one, target.probe.info, facts) is None]
    return max(able, key=lambda one: one.impl.rank, default=None)


def refusal(target: Target, offer: Offer, sizes: Sizes, dtype: str, *, backward: bool) -> str | None:
    """Why an offer is not asked these sizes in this dtype, as the plan would say it; None where it is."""
    op, info = offer.impl.op, target.probe.info
    if dtype not in info.dtypes:
        return f"{info.name or info.type} has no {dtype}"
    facts = facts_of(op, sizes, dtype)
    if op not in CACHE_OF:
        return refused(offer, info, facts, backward=backward)
    cache = cache_of(target, offer, facts)
    why = refused(offer, info, {**facts, "cache": cache.id if cache else "none"}, backward=backward)
    return why if why or cache else "none of the caches that it reads is here"


def measure(
    target: Target, offer: Offer, sizes: Sizes, dtype: str, patience: Patience, *, backward: bool = False
) -> Outcome:
    """Time an offer, and a copy and a product beside it.

    Figures: seconds, bytes, flops, their rates, those of the copy and the product, shares of these, and
    `share_of_bound`: the time that the slower of both would take at least, over the time that was taken.
    A pass with `backward` counts three times the bytes and FLOPs of one without.
    """
    place, device = target.device.open(0), target.device
    best = best_of(device, place, DTYPES[dtype], patience, large=is_large(target))
    work = LOADS[offer.impl.op].make(sizes, DTYPES[dtype])
    tensors = on_device(work, place, float64="float64" in target.probe.info.dtypes)
    parts = parts_of(target, offer, facts_of(offer.impl.op, sizes, dtype))
    if backward:
        seconds, passes = _trained(work, parts, tensors, device, patience), 3
    else:
        with torch.no_grad():
            seconds, passes = seconds_of(work.prepare(parts, tensors), device, patience), 1
    found = figures(work.bytes * passes, work.flops * passes, seconds, best)
    return passed(figures=found, worst={"dtype": dtype, **sizes})


def on_device(work: Work, place: torch.device, *, float64: bool, seed: int = 1) -> dict[str, torch.Tensor]:
    """The inputs, float64 ones as float32 where the device lacks it."""
    drawn = work.tensors(seed)
    if not float64:
        drawn = {name: x.float() if x.dtype == torch.float64 else x for name, x in drawn.items()}
    return {name: x.to(place) for name, x in drawn.items()}


def parts_of(target: Target, offer: Offer, facts: Mapping[str, Any]) -> list[Any]:
    """The offer's code, behind that of its cache or partner; it takes every argument of the contract."""
    op = offer.impl.op
    found: list[Offer] = []
    if op in CACHE_OF:
        cache = cache_of(target, offer, facts)
        found += [cache] if cache else []
    elif FAMILIES[op].partner:
        rows = target.offers[FAMILIES[op].partner]
        order = {"id": offer.id, "plugin": offer.plugin}
        found.append(max(rows, key=lambda one: (one.id == order["id"], one.plugin == order["plugin"],
                                                one.impl.rank)))  # fmt: skip
    return [_served(one) for one in [*found, offer]]


def _served(offer: Offer) -> Any:
    impl, contract = offer.impl, CONTRACTS[offer.impl.op]
    served = import_pointer(impl.load)
    missed = {name: value for name, (version, value) in contract.added.items() if version > impl.contract}
    if not missed:
        return served
    row = Choice(op=impl.op, chosen=offer.id, load=impl.load, reason="", contract=impl.contract)
    return adapt(served, row, missed, contract.hints)


def figures(count: float, flops: float, seconds: float, best: Best) -> dict[str, float]:
    """See `measure`."""
    return {
        "seconds": seconds,
        "bytes": float(count),
        "flops": float(flops),
        "bytes_per_second": count / seconds,
        "flops_per_second": flops / seconds,
        "copy_bytes_per_second": best.copy,
        "matmul_flops_per_second": best.matmul,
        "share_of_copy": count / seconds / best.copy,
        "share_of_matmul": flops / seconds / best.matmul,
        "share_of_bound": max(count / best.copy, flops / best.matmul) / seconds,
    }


def _trained(work: Work, parts: Sequence[Any], tensors: Tensors, device: Any, patience: Patience) -> float:
    """Seconds of a forward and a backward pass together."""
    leaves = [tensors[name].requires_grad_() for name in work.differentiable]
    call = work.prepare(parts, tensors)

    def both() -> None:
        returned = call()
        outputs = [x for x in (returned if isinstance(returned, tuple) else (returned,))
                   if isinstance(x, torch.Tensor) and x.requires_grad]  # fmt: skip
        torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs], allow_unused=True)

    return seconds_of(both, device, patience)
