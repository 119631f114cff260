"""Graphs of the simulated device, and rollouts through them (graph_checks)."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_conformance.case import Case
from grpo_conformance.sim import build as building
from grpo_conformance.worker import Worker

sys.path.insert(0, str(Path(__file__).parent))  # the child imports graph_checks by name

CHECKS = (
    "replays", "refusals", "moved", "decode", "recurrent", "memory", "padded", "training", "reasons", "baked",
)  # fmt: skip
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    building.build(Path.home() / building.CACHE)
    worker = Worker("sim")
    yield worker
    worker.close()


@pytest.mark.parametrize("name", CHECKS)
def test_graphs(worker: Worker, name: str) -> None:
    case = Case(id=name, level=1, subject="device", run=f"graph_checks:{name}", timeout=240.0)
    outcome = worker.run(case)
    assert (outcome.status, outcome.message) == ("pass", "")
