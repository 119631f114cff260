"""Ops that must agree bit for bit are served by one offer."""

from __future__ import annotations

import pytest
from plan_helpers import CPU

from grpo_core.errors import PlanError
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Choice, Plan
from grpo_core.planning import TOGETHER, refuse_mixtures


def plan(**chosen: str | None) -> Plan:
    choices = [
        Choice(
            op=op.replace("__", "."), chosen=offer, load="", reason="",
            covered_by="attention.step" if op == "attention__decode" and offer == "a:covered" else None,
        )
        for op, offer in chosen.items()
    ]  # fmt: skip
    return Plan(device=CPU, choices=tuple(choices), plugins=(), fallback="none")


def test_offers_of_two_implementations_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"linear.dense, linear.packed") as error:
        refuse_mixtures(plan(linear__dense="a:x", linear__packed="a:y", norm__rms="b:z"))
    assert "linear.packed is served by a:y" in str(error.value)


def test_one_offer_for_each_line_is_fine() -> None:
    refuse_mixtures(plan(linear__dense="a:x", linear__packed="a:x", mla__varlen="b:x", mla__decode="b:x"))
    refuse_mixtures(plan(attention__varlen="a:x", attention__decode="a:covered", attention__step="a:x"))
    refuse_mixtures(plan(attention__varlen="a:x", attention__step=None))


def test_every_op_named_is_a_contract() -> None:
    assert {op for ops in TOGETHER for op in ops} <= CONTRACTS.keys()
