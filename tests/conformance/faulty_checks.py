"""Checks that misbehave, for the tests of the suite's own processes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from grpo_conformance.case import Outcome, Target, passed

SEEN: list[str] = []


def fine(target: Target, *, word: str = "") -> Outcome:
    """Passes, and tells what this process has seen before."""
    before = " ".join(SEEN)
    SEEN.append(word)
    return passed(message=before, figures={"pid": float(os.getpid())})


def raises(target: Target) -> Outcome:
    raise RuntimeError("the driver said no")


def leaves(target: Target) -> Outcome:
    raise SystemExit(3)


def segfaults(target: Target) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    return passed()


def exits(target: Target) -> Outcome:
    os._exit(7)


def hangs(target: Target) -> Outcome:
    time.sleep(600)
    return passed()


def slow(target: Target) -> Outcome:
    time.sleep(0.5)
    return passed()


def garbage(target: Target) -> Any:
    return {"status": "pass"}
