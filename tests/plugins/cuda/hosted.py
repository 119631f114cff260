"""Offers of the CUDA plugin whose code knows no GPU, as if they were for the host, and questions to them."""

from __future__ import annotations

import functools
from dataclasses import replace

from grpo_conformance.case import Case, Outcome, Target, check_of
from grpo_conformance.levels import ops
from grpo_conformance.target import open_target
from grpo_core.catalogue import Offer
from grpo_cuda.offers_attention import OFFERS

TORCH = ("sdpa", "paged", "small_pages")
"""Attention in plain torch. flex_attention has no backward pass on a CPU."""


@functools.cache
def target(*names: str) -> Target:
    """The host with the plugin's attention of these names; nothing is recorded in graphs there."""
    chosen: dict[str, tuple[Offer, ...]] = {}
    for impl in OFFERS:
        if impl.name in names:
            here = replace(impl, device="cpu", graph=False, when=None, requires=())
            chosen[impl.op] = (*chosen.get(impl.op, ()), Offer(plugin="cuda", impl=here))
    return replace(open_target("cpu"), offers=chosen)


def cases(*names: str) -> list[Case]:
    """What the conformance suite asks of them."""
    return list(ops.cases(target(*names), quick=False))


def ask(case: Case, *names: str) -> Outcome:
    """One case, in this process."""
    return check_of(case)(target(*names), **case.args)
