"""The one test of the suite: every case is an item of it. Run through `grpo conformance`."""

from __future__ import annotations

import pytest

from .case import Case
from .pytest_glue import Session


def test_conformance(case: Case, conformance: Session, record_property: pytest.Function) -> None:
    """Run a case in its process; a broken promise fails the item with what was found."""
    outcome = conformance.settle(case, conformance.worker.run(case))
    record_property("conformance", conformance.pack(case, outcome))  # type: ignore[operator]
    if outcome.status in ("not_declared", "known"):
        pytest.skip(f"{outcome.status}: {outcome.message}")
    if outcome.status != "pass":
        pytest.fail(conformance.tell(case, outcome), pytrace=False)
