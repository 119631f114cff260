"""The faulty functions and classes by their mutant's name, for the pointers of offers."""

from __future__ import annotations

import functools
from typing import Any

from grpo_core.backend import import_pointer
from grpo_core.ops.contract import CONTRACTS

from .mutant import healthy_offers
from .table import MUTANTS

RECORDED = ("attention.decode",)
"""Ops that read of `common` what lets a graph record them."""


@functools.cache
def __getattr__(name: str) -> Any:
    mutant = next((one for one in MUTANTS if one.slug == name and one.where in CONTRACTS), None)
    if mutant is None:
        raise AttributeError(f"no mutant of an op is called {name}")
    healthy = import_pointer(healthy_offers()[mutant.where].load)
    if mutant.how is None:
        return healthy
    if CONTRACTS[mutant.where].kind == "class":
        return mutant.how(healthy)

    def faulty(*given: Any, **named: Any) -> Any:
        if mutant.where not in RECORDED:
            # Lengths on the host would be right where the fault is in those on the device.
            named.pop("common", None)
        return mutant.how(healthy, *given, **named)

    # The signature of what works, so that nothing notices the fault before it is asked.
    return functools.update_wrapper(faulty, healthy)
