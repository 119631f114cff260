"""Between pytest and the suite: options, the items, and the outcomes on their way to the report.

Outcomes travel as properties of pytest's own reports, so that `-n` (pytest-xdist) works as well.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from . import model_cases
from .case import BROKEN, Case, Outcome, Target
from .collect import collect
from .known import Known, read_known
from .target import open_target
from .worker import Worker

PROPERTY = "conformance"


@dataclass(slots=True)
class Session:
    """What the items share."""

    target: Target
    worker: Worker
    known: tuple[Known, ...]
    results: dict[str, tuple[Case, Outcome]] = field(default_factory=dict)

    def settle(self, case: Case, outcome: Outcome) -> Outcome:
        """A failure that the vendor knows is told as such."""
        entry = next((entry for entry in self.known if entry.matches(case.id)), None)
        if entry is None or outcome.status not in BROKEN:
            return outcome
        return replace(outcome, status="known", message=f"{entry.reason} ({outcome.message})")

    def pack(self, case: Case, outcome: Outcome) -> str:
        """A case and its outcome as text."""
        return json.dumps({"case": asdict(case), "outcome": asdict(outcome)})

    def tell(self, case: Case, outcome: Outcome) -> str:
        """A failure as a person reads it."""
        lines = [f"{case.subject}: {outcome.status}: {outcome.message}"]
        if outcome.error is not None:
            lines.append(f"error {outcome.error:.3g}, tolerance {outcome.tolerance}")
        lines += [f"  {name}: {value}" for name, value in outcome.worst.items()]
        return "\n".join(lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that `grpo conformance` hands over."""
    group = parser.getgroup("grpo conformance")
    group.addoption("--conformance-device", default="cpu")
    group.addoption("--conformance-levels", default="")
    group.addoption("--conformance-quick", action="store_true")
    group.addoption("--conformance-known", default="")
    group.addoption("--conformance-model", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Open the target once; every item goes through the session made here."""
    device = config.getoption("--conformance-device")
    path = config.getoption("--conformance-known")
    known = read_known(Path(path), today=datetime.date.today()) if path else ()
    config.stash[SESSION] = Session(open_target(device), Worker(device), known)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each case, its id the case's own."""
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    levels = [int(level) for level in config.getoption("--conformance-levels").split(",") if level]
    quick, target = config.getoption("--conformance-quick"), config.stash[SESSION].target
    model = config.getoption("--conformance-model")
    if model:
        cases = model_cases.cases(model, target.catalogue, levels=levels, quick=quick)
    else:
        cases = collect(target, levels=levels, quick=quick)
    metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture(scope="session")
def conformance(request: pytest.FixtureRequest) -> Iterator[Session]:
    """The session, its process ended at the end."""
    session = request.config.stash[SESSION]
    yield session
    session.worker.close()


class Results:
    """A pytest plugin that takes the outcomes back out of pytest's reports, in the order of items."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Case, Outcome]] = {}
        self.collected: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Ids of the items that are going to run."""
        self.collected = [item.callspec.params["case"].id for item in session.items]  # type: ignore[attr-defined]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """The same where pytest-xdist's processes collect, and this one does not."""
        self.collected = [name.partition("[")[2].removesuffix("]") for name in ids]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One outcome a case."""
        if report.when != "call":
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                packed: dict[str, Any] = json.loads(str(value))
                case, outcome = Case(**packed["case"]), Outcome(**packed["outcome"])
                self.found[case.id] = (case, outcome)


SESSION = pytest.StashKey[Session]()
