"""Limits of time hold on an idle machine and do not run while the machine is away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_conformance.case import Case, Outcome
from grpo_conformance.worker import Worker

WAITER = """
import sys
from multiprocessing.connection import Connection
from grpo_conformance.patience import Patience
patience = Patience(limit=1.0)
print("waiting", flush=True)
got = patience.wait([Connection(int(sys.argv[1]), writable=False)])
print(len(got), patience.spent, patience.away, flush=True)
"""


def waited(stop: float, answer: bool) -> tuple[int, float, float]:
    """What a process finds that waits for a second, is stopped for a while and then perhaps answered."""
    read, write = os.pipe()
    words = [sys.executable, "-c", WAITER, str(read)]
    waiter = subprocess.Popen(words, pass_fds=[read], stdout=subprocess.PIPE, text=True)
    assert waiter.stdout is not None
    try:
        assert waiter.stdout.readline() == "waiting\n"
        if stop:
            time.sleep(0.3)  # until it waits
            waiter.send_signal(signal.SIGSTOP)
            time.sleep(stop)
            waiter.send_signal(signal.SIGCONT)
        if answer:
            os.write(write, b"x")
        got, spent, away = waiter.stdout.readline().split()
        return int(got), float(spent), float(away)
    finally:
        waiter.kill()
        waiter.wait()
        waiter.stdout.close()
        os.close(read)
        os.close(write)


def test_a_machine_that_was_away_does_not_make_a_case_hang() -> None:
    got, spent, away = waited(stop=2.0, answer=True)
    assert got == 1
    assert away > 1.0 and spent <= 1.0


def test_the_limit_comes_where_nobody_answers() -> None:
    got, spent, _ = waited(stop=0.0, answer=False)
    assert got == 0
    assert spent == pytest.approx(1.0)


class Scripted(Worker):
    """A worker that is told what its cases find, and for how long the machine was away."""

    def __init__(self, *answers: tuple[str, float]) -> None:
        super().__init__("cpu")
        self.answers = list(answers)

    def _ask(self, case: Case) -> tuple[Outcome, float]:
        status, away = self.answers.pop(0)
        return Outcome(status=status), away  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answers", "timed", "status", "left"),
    [
        ([("fail", 9.0), ("pass", 0.0)], True, "pass", 0),
        ([("fail", 9.0), ("fail", 9.0)], True, "fail", 0),
        ([("fail", 0.1), ("pass", 0.0)], True, "fail", 1),
        ([("fail", 9.0), ("pass", 0.0)], False, "fail", 1),
        ([("timeout", 9.0), ("pass", 0.0)], False, "pass", 0),
        ([("timeout", 0.1), ("pass", 0.0)], False, "timeout", 1),
    ],
)
def test_only_what_time_can_spoil_is_asked_again_and_only_once(
    answers: list[tuple[str, float]], timed: bool, status: str, left: int
) -> None:
    worker = Scripted(*answers)
    case = Case(id="a", level=4, subject="s", run="m:f", timed=timed)
    outcome = worker.run(case)
    assert outcome.status == status and len(worker.answers) == left
    assert ("asked again, seconds away" in outcome.figures) == (left == 0)


def test_a_stopped_suite_finds_no_hang(tmp_path: Path) -> None:
    """The whole suite was stopped for minutes, and a sound case counted as hung."""
    script = """
import sys
from grpo_conformance.case import Case
from grpo_conformance.worker import Worker
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    worker = Worker("cpu")
    worker.run(Case(id="w", level=2, subject="s", run="faulty_checks:fine"))
    print("warm", flush=True)
    outcome = worker.run(Case(id="a", level=2, subject="s", run="faulty_checks:slow", timeout=2.0))
    print(outcome.status, flush=True)
    worker.close()
"""
    path = tmp_path / "suite_that_stops.py"
    path.write_text(script)
    words = [sys.executable, str(path), str(Path(__file__).parent)]
    suite = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert suite.stdout is not None
    try:
        assert suite.stdout.readline() == "warm\n"
        time.sleep(0.2)
        os.killpg(suite.pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.killpg(suite.pid, signal.SIGCONT)
        assert suite.stdout.readline() == "pass\n"
    finally:
        os.killpg(suite.pid, signal.SIGKILL)
        suite.wait()
        suite.stdout.close()


def test_a_traceback_of_a_report_names_no_place_of_the_machine() -> None:
    from grpo_conformance.comm import crew

    frame = f'File "{crew.__file__}", line 7 in wait'
    assert crew._short(frame) == 'File "grpo_conformance/comm/crew.py", line 7 in wait'
