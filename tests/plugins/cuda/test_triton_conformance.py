"""The conformance suite's questions to the Triton kernels, answered by Triton's interpreter on the CPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import triton_interpreted

from grpo_conformance.case import Case

SLOW = ("vocabulary above 2^16",)
"""Shapes of thousands of tiles."""


def _marked(case: Case) -> Any:
    slow = case.args.get("shape") in SLOW
    return pytest.param(case, id=case.id, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("case", [_marked(case) for case in triton_interpreted.cases()])
def test_case(interpreter: ProcessPoolExecutor, case: Case) -> None:
    outcome = interpreter.submit(triton_interpreted.ask, case).result()
    assert outcome.status == "pass", f"{outcome.message} {dict(outcome.worst)}"
