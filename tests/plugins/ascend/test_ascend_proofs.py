"""What the offers claim to be shown on a simulated CANN stands in the committed report of a whole run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grpo_ascend import offers as table
from grpo_conformance.cann.limits import LIMITS
from grpo_conformance.report import read
from grpo_conformance.sign import problem
from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS

REPORT = Path(__file__).parents[3] / "conformance" / "reports" / "ascend-simulated.json"
LEVELS = {"memory.allocator": ("memory", "ascend:npu")}
"""Where the suite asks about an op by another name than "OP OFFER"."""
BROKEN = {"fail", "error", "crash", "timeout"}


def impls() -> list[Impl]:
    hooks = sorted({contract.hook for contract in CONTRACTS.values()})
    return [impl for hook in hooks for impl in table.offers(hook)]


def unproven(impl: Impl, report: dict[str, Any]) -> str:
    """Why a report does not show what an offer does; "" where it does."""
    level, subject = LEVELS.get(impl.op, ("", f"{impl.op} ascend:{impl.name}"))
    found = Counter(
        case["status"]
        for case in report["cases"]
        if case["subject"] == subject and case["id"].startswith(level)
    )
    broken = sum(found[status] for status in BROKEN)
    if broken or found["known"]:
        return f"{subject}: {broken or found['known']} cases do not pass"
    return "" if found["pass"] else f"{subject}: no case passes"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return read(REPORT)


def test_the_report_is_of_a_whole_run_and_says_what_it_cannot_tell(report: dict[str, Any]) -> None:
    assert problem(report) is None, "its digest is not that of what it says"
    assert report["command"].startswith("grpo conformance ascend") and not report["quick"]
    assert [row["level"] for row in report["levels"]] == list(range(7))
    target = report["target"]
    assert (target["device"], target["type"], target["simulated"]) == ("ascend", "npu", True)
    assert target["limits"] == list(LIMITS)
    assert report["verdict"] == "pass" and not report["known"]
    assert report["environment"]["packages"]["torch-npu"] == "2.13.0"


def test_what_is_claimed_to_be_simulated_passed_there(report: dict[str, Any]) -> None:
    claimed = [impl for impl in impls() if impl.proof == "simulated"]
    assert claimed
    assert not [reason for impl in claimed if (reason := unproven(impl, report))]


def test_an_offer_whose_cases_are_missing_or_broken_could_not_claim_it(report: dict[str, Any]) -> None:
    swiglu = next(impl for impl in impls() if impl.op == "mlp.swiglu")
    cases = [case for case in report["cases"] if case["subject"] != "mlp.swiglu ascend:npu"]
    assert unproven(swiglu, {"cases": cases}) == "mlp.swiglu ascend:npu: no case passes"
    first = next(case for case in report["cases"] if case["subject"] == "mlp.swiglu ascend:npu")
    broken = [*report["cases"], {**first, "status": "fail"}]
    assert unproven(swiglu, {"cases": broken}) == "mlp.swiglu ascend:npu: 1 cases do not pass"


def test_nothing_is_claimed_for_hardware() -> None:
    assert {impl.proof for impl in impls()} <= {"audited", "simulated"}
