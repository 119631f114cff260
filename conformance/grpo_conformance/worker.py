"""Runs cases in processes of their own, so that a crash or a hang is an outcome and not the end."""

from __future__ import annotations

import multiprocessing
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from grpo_core.plugins import Raised, attempt

from .case import BROKEN, Case, Outcome, check_of
from .patience import Patience

START_SECONDS = 60.0
"""Added to a case's own time while its process starts."""
AWAY = 1.0
"""Seconds that the machine must have been away for a case about time to be asked again."""


class Worker:
    """One process at a time, kept for as long as cases belong to the same room.

    A broken offer can leave the process in any state, so that another room gets a fresh one, and so does
    a case that asks to be alone or comes after a fragile one that failed. Processes are forked from a server
    that has imported torch and no plugin.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.room: str | None = None
        self.process: Any = None
        self.link: Connection | None = None

    def run(self, case: Case) -> Outcome:
        """The outcome of a case, however it ends.

        A case that failed on account of time while the machine was away is asked once more; its figures then
        say for how long that was.
        """
        outcome, away = self._ask(case)
        late = outcome.status == "timeout" or (case.timed and outcome.status in BROKEN)
        if not late or away < AWAY:
            return outcome
        self.close()
        outcome, _ = self._ask(case)
        return replace(outcome, figures={**outcome.figures, "asked again, seconds away": round(away, 1)})

    def _ask(self, case: Case) -> tuple[Outcome, float]:
        """The outcome, and for how many seconds the machine was away meanwhile."""
        room = case.room or case.subject
        fresh = case.alone or self.room != room or self.process is None
        if fresh:
            self.close()
            self._start(room)
        assert self.link is not None
        began = time.monotonic()
        patience = Patience(limit=case.timeout + (START_SECONDS if fresh else 0.0))
        try:
            self.link.send(case)
            outcome = self.link.recv() if patience.wait([self.link]) else _hung(case)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            outcome = self._death()
        spoilt = case.fragile and outcome.status in BROKEN
        if case.alone or spoilt or outcome.status in ("crash", "timeout"):
            self.close()
        return replace(outcome, seconds=round(time.monotonic() - began, 4)), patience.away

    def close(self) -> None:
        """End the process, by force where it does not go."""
        if self.link is not None:
            self.link.close()
        if self.process is not None:
            self.process.join(1.0)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
        self.process = self.link = self.room = None

    def _start(self, room: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "grpo_core.backend", "grpo_conformance.case"])
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.device), daemon=False)
        self.process.start()
        theirs.close()
        self.room = room

    def _death(self) -> Outcome:
        self.process.join(5.0)
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        else:
            how = f"exit code {code}"
        return Outcome(status="crash", message=f"the process of the case ended by {how}")


def _hung(case: Case) -> Outcome:
    return Outcome(status="timeout", message=f"no answer within {case.timeout:.0f} s")


def serve(link: Connection, device: str) -> None:
    """The child: answers cases until the other side closes. The target is opened with the first of them."""
    from .target import open_target

    target: Any = None
    while True:
        try:
            case = link.recv()
        except EOFError:
            return
        if target is None:
            target = attempt(lambda: open_target(device))
        if isinstance(target, Raised):
            link.send(Outcome(status="error", message=f"the target cannot be opened: {target}"))
            continue
        link.send(answer(case, target))


def answer(case: Case, target: Any) -> Outcome:
    """Run a case in this process; whatever it raises becomes an outcome."""
    found = attempt(lambda: check_of(case)(target, **case.args))
    if isinstance(found, Raised):
        return Outcome(status="error", message=f"raised {found}")
    if not isinstance(found, Outcome):
        return Outcome(status="error", message=f"the check returned {type(found).__name__}, not an Outcome")
    return found
