"""The conformance suite's questions to what of the CUDA plugin runs on the host."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import hosted
import pytest

from grpo_conformance.case import Case

CASES = hosted.cases(*hosted.TORCH)
DECODE = ("triton", "small_pages", "paged")
DECODE_CASES = [case for case in hosted.cases(*DECODE) if case.subject.endswith("cuda:triton")]


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_torch(case: Case) -> None:
    outcome = hosted.ask(case, *hosted.TORCH)
    assert outcome.status == "pass", f"{outcome.message} {dict(outcome.worst)}"


@pytest.mark.parametrize("case", DECODE_CASES, ids=[case.id for case in DECODE_CASES])
def test_triton(interpreter: ProcessPoolExecutor, case: Case) -> None:
    outcome = interpreter.submit(hosted.ask, case, *DECODE).result()
    assert outcome.status == "pass", f"{outcome.message} {dict(outcome.worst)}"
