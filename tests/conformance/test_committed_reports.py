"""The reports in `conformance/reports`: whole, passed, and about what there is today."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo_conformance.case import LEVELS
from grpo_conformance.mutants.run import HEALTHY_LEVELS
from grpo_conformance.mutants.table import MUTANTS
from grpo_conformance.ops.table import FAMILIES
from grpo_conformance.target import open_target
from grpo_core.cli.main import main

REPORTS = Path(__file__).parents[2] / "conformance" / "reports"
DEVICES = ("cpu", "sim")
REMADE = "make the reports again: conformance/reports/README.md has the commands"


def report(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("path", sorted(REPORTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_report_verifies_and_names_no_place(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conformance", "verify", str(path)]) == 0
    assert "valid (digest only" in capsys.readouterr().out
    places = re.findall(
        r"[^\w.](/(?:tmp|root|home|work|Users|var)/[^\"\s]*)", path.read_text(encoding="utf-8")
    )
    assert not places


@pytest.mark.parametrize("name", DEVICES)
def test_the_report_of_a_device_is_a_pass_of_every_level(name: str) -> None:
    content = report(name)
    assert (content["verdict"], content["quick"], content["target"]["device"]) == ("pass", False, name)
    assert content["target"]["simulated"] == (name == "sim")
    assert {row["name"]: row["verdict"] for row in content["levels"]} == dict.fromkeys(LEVELS, "pass")
    assert content["known"] == []
    assert content["command"] == f"grpo conformance {name} --json conformance/reports/{name}.json"


@pytest.mark.parametrize("name", DEVICES)
def test_the_report_of_a_device_is_about_the_offers_of_today(name: str) -> None:
    asked = {row["subject"] for row in report(name)["subjects"] if row["level"] == LEVELS.index("ops")}
    target = open_target(name)
    offered = {f"{op} {offer.id}" for op, row in target.offers.items() if op in FAMILIES for offer in row}
    assert offered == asked, REMADE


def test_every_mutant_of_today_was_caught_and_twenty_draws_raised_no_alarm() -> None:
    content = report("mutants")
    assert {row["name"]: row["level"] for row in content["rows"]} == {m.name: m.level for m in MUTANTS}, (
        REMADE
    )
    assert content["mutants"] == content["caught"] == len(MUTANTS)
    assert (content["verdict"], content["false_alarms"], content["alarms"]) == ("pass", 0, [])
    healthy = content["healthy"]
    assert healthy["draws"] >= 20 and healthy["cases"] > 20 * 100
    assert tuple(healthy["levels"]) == HEALTHY_LEVELS
