"""All that the CUDA plugin offers, collected from tables by subject; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS

from . import offers_attention, offers_moe, offers_system, offers_torch, offers_triton

TABLES = (offers_attention, offers_moe, offers_triton, offers_system, offers_torch)
"""Modules with a tuple OFFERS; the order says nothing, ranks decide."""


def offers(hook: str) -> Iterable[Impl]:
    """The offers of one hook."""
    for table in TABLES:
        for impl in table.OFFERS:
            if CONTRACTS[impl.op].hook == hook:
                yield impl
