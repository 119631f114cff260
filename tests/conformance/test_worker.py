"""A broken offer cannot stop the suite: whatever its process does is an outcome."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_conformance.case import Case
from grpo_conformance.worker import Worker

sys.path.insert(0, str(Path(__file__).parent))  # the child imports faulty_checks by name


def case(
    name: str, *, subject: str = "one", timeout: float = 30.0, alone: bool = False, word: str = ""
) -> Case:
    return Case(
        id=f"test/{name}/{word}", level=2, subject=subject, run=f"faulty_checks:{name}", timeout=timeout,
        alone=alone, args={"word": word} if name == "fine" else {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker("cpu")
    yield worker
    worker.close()


def test_exceptions_are_errors_with_their_words(worker: Worker) -> None:
    outcome = worker.run(case("raises"))
    assert (outcome.status, outcome.message) == ("error", "raised RuntimeError: the driver said no")
    assert worker.run(case("leaves")).status == "error"


@pytest.mark.parametrize(("name", "how"), [("segfaults", "SIGSEGV"), ("exits", "exit code 7")])
def test_a_dying_process_is_a_crash_and_the_next_case_runs(worker: Worker, name: str, how: str) -> None:
    outcome = worker.run(case(name))
    assert outcome.status == "crash"
    assert how in outcome.message
    assert worker.run(case("fine")).status == "pass"


def test_a_hang_ends_at_its_limit(worker: Worker) -> None:
    worker.run(case("fine"))
    began = time.monotonic()
    outcome = worker.run(case("hangs", timeout=1.0))
    assert outcome.status == "timeout"
    assert time.monotonic() - began < 20
    assert worker.run(case("fine")).status == "pass"


def test_an_answer_that_is_no_outcome_is_an_error(worker: Worker) -> None:
    outcome = worker.run(case("garbage"))
    assert outcome.status == "error"
    assert "dict" in outcome.message


def test_a_subject_keeps_its_process_and_shares_it_with_no_other(worker: Worker) -> None:
    first = worker.run(case("fine", subject="a", word="first"))
    second = worker.run(case("fine", subject="a", word="second"))
    other = worker.run(case("fine", subject="b"))
    assert first.figures["pid"] == second.figures["pid"] != other.figures["pid"]
    assert second.message == "first"
    assert other.message == ""


def test_a_lonely_case_has_a_process_of_its_own(worker: Worker) -> None:
    first = worker.run(case("fine", subject="c"))
    lonely = worker.run(case("fine", subject="c", alone=True))
    after = worker.run(case("fine", subject="c"))
    assert len({outcome.figures["pid"] for outcome in (first, lonely, after)}) == 3


def test_a_device_that_nobody_knows_is_an_error_of_every_case() -> None:
    worker = Worker("abacus")
    outcome = worker.run(case("fine"))
    worker.close()
    assert outcome.status == "error"
    assert "abacus" in outcome.message
