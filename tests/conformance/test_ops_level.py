"""The level of ops on the CPU and all that is offered for it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_conformance.case import Target, check_of
from grpo_conformance.levels import ops
from grpo_conformance.ops.facts import counted, ends, refused, usual
from grpo_conformance.ops.table import FAMILIES
from grpo_conformance.target import open_target
from grpo_core.catalogue import Offer
from grpo_core.impl import DeviceInfo, Impl
from grpo_core.ops.contract import CONTRACTS

ELSEWHERE = ("memory.", "comm.", "engine.")
INFO = DeviceInfo(type="cpu", dtypes=frozenset({"float32", "bfloat16"}))


@pytest.fixture(scope="module")
def target() -> Target:
    return open_target("cpu")


def offer(**changes: Any) -> Offer:
    given = {"op": "attention.varlen", "name": "x", "device": "cpu", "load": "m:f", "backward": True}
    return Offer(plugin="acme", impl=Impl(**{**given, **changes}))


def test_every_contract_has_cases() -> None:
    assert set(FAMILIES) == {op for op in CONTRACTS if not op.startswith(ELSEWHERE)}
    for family in FAMILIES.values():
        assert set(family.quick) & set(family.shapes)
        assert set(family.trained) <= set(family.shapes)


def test_every_offer_of_the_cpu_has_cases_of_each_of_its_dtypes(target: Target) -> None:
    found = Counter((case.args["op"], case.args["offer_id"]) for case in ops.cases(target, quick=True))
    offered = {(op, one.id) for op, row in target.offers.items() if op in FAMILIES for one in row}
    assert set(found) == offered


@pytest.mark.slow
def test_the_cpu_passes_a_quick_run(target: Target) -> None:
    threads = torch.get_num_threads()
    wrong = []
    for case in ops.cases(target, quick=True):
        outcome = check_of(case)(target, **case.args)
        if outcome.status not in ("pass", "not_declared"):
            wrong.append(f"{case.id}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    assert torch.get_num_threads() == threads


def test_sizes_are_the_ends_of_what_is_declared() -> None:
    one = offer(limits={"head_dim": range(48, 193, 16), "v_head_dim": range(48, 193, 16)})
    family = FAMILIES["attention.varlen"]
    facts = usual(one, INFO, {"dtype": ("float32",), **family.axes})
    assert not isinstance(facts, str) and facts["head_dim"] in range(48, 193, 16)
    names, span = family.ends["head dim"]
    assert [each["head_dim"] for each in ends(one, INFO, facts, names, span)] == [48, 192]
    assert counted(frozenset({True, "a", 3})) == [3] and counted(None) == []


def test_an_offer_that_serves_nothing_here_is_not_declared() -> None:
    picky = offer(when=lambda info, need: "the moon is not full")
    wanted = SimpleNamespace(
        offers={"attention.varlen": (picky,)}, probe=SimpleNamespace(info=INFO), device=None
    )
    (case,) = ops.cases(wanted, quick=False)  # type: ignore[arg-type]
    outcome = check_of(case)(wanted, **case.args)
    assert outcome.status == "not_declared" and outcome.message == "the moon is not full"


def test_a_limit_that_holds_nothing_back_is_told() -> None:
    class Everything:
        def __contains__(self, value: object) -> bool:
            return True

    for limits, told in (({"head_dim": Everything()}, "allows"), ({"head_dim": range(16, 65, 16)}, "")):
        wanted = SimpleNamespace(
            offers={"attention.varlen": (offer(limits=limits),)}, probe=SimpleNamespace(info=INFO)
        )
        outcome = ops.limits(wanted, op="attention.varlen", offer_id="acme:x")  # type: ignore[arg-type]
        assert outcome.status == ("fail" if told else "pass") and told in outcome.message


def test_facts_beyond_a_limit_are_refused() -> None:
    one = offer(limits={"head_dim": frozenset({64})}, backward=False)
    assert refused(one, INFO, {"head_dim": 64}) is None
    assert "head_dim=65" in str(refused(one, INFO, {"head_dim": 65}))
    assert "backward" in str(refused(one, INFO, {"head_dim": 64}, backward=True))
