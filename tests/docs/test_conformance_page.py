"""docs/conformance.md says what the suite does: levels, statuses, the formula, the keys of a report."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
from followed_page import ROOT, blocks

from grpo_conformance import cli, compare, diff, report
from grpo_conformance.case import LEVELS, Case, Outcome, Status
from grpo_conformance.known import read_known
from grpo_conformance.ops import tolerance
from grpo_conformance.target import open_target

NAME = "conformance.md"
PAGE = (ROOT / "docs" / NAME).read_text()


def rows(*, under: str) -> list[str]:
    """First cells in backquotes of the first table below a heading."""
    table = PAGE.split(f"\n{under}\n", 1)[1].split("\n| --- ", 1)[1].split("\n\n", 1)[0]
    return re.findall(r"^\|(?: \d \|)? `(\w+)` \|", table, re.MULTILINE)


def test_the_levels_are_those_of_the_suite() -> None:
    assert tuple(rows(under="## Levels")) == LEVELS


def test_every_status_is_explained() -> None:
    assert set(rows(under="## Verdicts")) == set(get_args(Status))


def test_every_key_of_a_report_is_explained() -> None:
    case = Case(id="ops/x", level=2, subject="x", run="m:f")
    content = report.build(open_target("cpu"), [(case, Outcome(status="pass"))], levels=[2], quick=True)
    assert rows(under="## The report") == [*content, "signature"]
    assert report.SCHEMA in PAGE


def test_the_formula_has_the_suites_constants() -> None:
    formula = (
        f"min({tolerance.MULTIPLE:g} x error of the reference, sqrt(u) s) + {tolerance.ROUNDINGS:g} (u s"
    )
    assert formula in PAGE
    assert f"is allowed {tolerance.LARGEST:g} times as much" in " ".join(PAGE.split())
    assert f"errors that grew by {diff.GROWN:g} times" in " ".join(PAGE.split())


def test_the_known_failures_of_the_page_are_read(tmp_path: Path) -> None:
    (text,) = [text for kind, text in blocks(NAME) if kind == "toml"]
    (tmp_path / "known.toml").write_text(text)
    (entry,) = read_known(tmp_path / "known.toml", today=datetime.date(2026, 1, 1))
    assert entry.issue and entry.until == datetime.date(2030, 1, 1)


@pytest.mark.parametrize(
    "line", [line for kind, text in blocks(NAME) if kind == "sh" for line in text.splitlines()]
)
def test_the_commands_of_the_page_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "grpo_conformance.cann"]:
        words = words[words.index("--") + 1 :]
    assert words[0] == "grpo"
    parser = argparse.ArgumentParser(exit_on_error=False)
    {"conformance": cli, "compare": compare}[words[1]].configure(parser)
    parser.parse_args(words[2:])
