"""The suite against known faults of the simulated device."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_conformance.case import LEVELS, Case, Outcome, Target
from grpo_conformance.mutants import run as running
from grpo_conformance.mutants.command import pick, report
from grpo_conformance.mutants.inject import by_name, open_mutated
from grpo_conformance.mutants.mutant import Mutant
from grpo_conformance.mutants.run import Alarm, Row, as_healthy, cases_for, false_alarms, hunt
from grpo_conformance.mutants.table import MUTANTS
from grpo_conformance.sign import problem
from grpo_conformance.sim import build as building
from grpo_core.errors import ConfigError
from grpo_core.ops.contract import CONTRACTS

compiled = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
FEW = (
    "mask off by one", "scale forgotten", "softmax in bf16", "attention accumulates in bf16",
    "limits that lie", "crash", "squares overflow", "shared pages given back", "RNG state not restored",
    "event over too early", "last bytes lost in sleep", "crash at import",
)  # fmt: skip
"""One of each way in which a fault gets in, and those for which a check had to be added."""


def test_the_table_has_forty_faults_of_every_level_but_speed() -> None:
    assert len(MUTANTS) >= 40
    assert {mutant.level for mutant in MUTANTS} == set(LEVELS) - {"speed"}
    twice = [name for name, count in Counter(mutant.slug for mutant in MUTANTS).items() if count > 1]
    assert not twice
    known = {*CONTRACTS, "device", "switch", "plugin"}
    assert {mutant.where for mutant in MUTANTS} <= known


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.slug)
def test_a_mutant_is_asked_about_by_its_level(mutant: Mutant) -> None:
    target = open_mutated(mutant)
    cases = cases_for(mutant, target)
    assert cases and {LEVELS[case.level] for case in cases} == {mutant.level}
    if mutant.ask:
        assert mutant.ask in cases[0].id
    if mutant.where in CONTRACTS:
        offer = target.catalogue.offer(mutant.where, "mutant:plain")
        assert offer is not None and offer.impl.rank > 50


def test_the_healthy_question_is_the_same_but_for_the_name() -> None:
    case = Case(
        id="ops/attention.decode/mutant:plain/x", level=2, subject="attention.decode mutant:plain", run="a:b",
        args={"offer_id": "mutant:plain", "facts": {"cache": "mutant:plain", "head_dim": 16}},
    )  # fmt: skip
    healthy = as_healthy(case)
    assert healthy.id == "ops/attention.decode/sim:plain/x"
    assert healthy.args == {"offer_id": "sim:plain", "facts": {"cache": "sim:plain", "head_dim": 16}}
    plugin = replace(case, id="plugin/mutant/import", args={"plugin": "mutant"})
    assert as_healthy(plugin).args == {"plugin": "sim"} and as_healthy(plugin).id == "plugin/sim/import"


class Scripted:
    """A worker whose answers are known beforehand."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def run(self, case: Case) -> Outcome:
        status = self.answers.get(case.id, "pass")
        return Outcome(status=status, message=f"said {status}")  # type: ignore[arg-type]

    def close(self) -> None: ...


def hunted(monkeypatch: pytest.MonkeyPatch, mutated: dict[str, str], healthy: dict[str, str]) -> Row:
    """One mutant with two cases, as workers with these answers find it."""
    cases = [
        Case(id=f"ops/norm.rms/mutant:plain/{name}", level=2, subject="s", run="a:b")
        for name in ("one", "two")
    ]
    workers = [Scripted(healthy), Scripted(mutated)]
    monkeypatch.setattr(running, "Worker", lambda device: workers.pop(0))
    monkeypatch.setattr(running, "cases_for", lambda mutant, target: cases)
    return hunt([by_name("eps outside of the root")])[0]


def test_a_case_that_fails_on_the_healthy_device_catches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = ("ops/norm.rms/{}/" + name for name in ("one", "two"))
    broken = {one.format("mutant:plain"): "fail", two.format("mutant:plain"): "crash"}
    row = hunted(monkeypatch, broken, {one.format("sim:plain"): "fail"})
    assert row.caught and row.case == two.format("mutant:plain") and row.status == "crash" and row.cases == 2
    row = hunted(monkeypatch, broken, {name.format("sim:plain"): "error" for name in (one, two)})
    assert not row.caught and "fails on the healthy device" in row.message
    assert not hunted(monkeypatch, {}, {}).caught


def test_names_and_levels_choose_mutants() -> None:
    assert pick([]) == list(MUTANTS)
    assert [mutant.name for mutant in pick(["crash", "hang"])] == ["hang", "crash"]
    assert {mutant.level for mutant in pick(["memory"])} == {"memory"}
    with pytest.raises(ConfigError, match="did you mean 'scale forgotten'"):
        pick(["scale forgoten"])


def test_the_report_counts_what_was_caught() -> None:
    row = Row(
        name="n", level="ops", where="norm.rms", caught_by="ops", case="c", status="fail", message="m",
        cases=1, seconds=0.1,
    )  # fmt: skip
    other = replace(row, caught_by="plugin")
    content = json.loads(json.dumps(report([row, other], [], draws=20, asked=7, seconds=1.0)))
    assert (content["mutants"], content["caught"], content["false_alarms"]) == (2, 1, 0)
    assert [one["caught"] for one in content["rows"]] == [True, False]
    assert (content["healthy"]["draws"], content["healthy"]["cases"]) == (20, 7)
    assert content["verdict"] == "fail" and problem(content) is None
    alarm = Alarm(case="c", draw=3, status="fail", message="m")
    verdicts = [report([row], alarms, draws=20, asked=7, seconds=1.0)["verdict"] for alarms in ([], [alarm])]
    assert verdicts == ["pass", "fail"]


@compiled
def test_a_few_faults_are_caught(tmp_path: Path) -> None:
    building.build(Path.home() / building.CACHE)
    missed = [row for row in hunt(pick(FEW)) if not row.caught]
    assert not missed


@compiled
@pytest.mark.slow
def test_every_mutant_is_caught_by_its_level() -> None:
    building.build(Path.home() / building.CACHE)
    missed = [row for row in hunt(MUTANTS) if not row.caught]
    assert not missed


@compiled
@pytest.mark.slow
def test_other_values_raise_no_false_alarm() -> None:
    building.build(Path.home() / building.CACHE)
    alarms, asked = false_alarms(range(1, 3), levels=("device", "ops", "memory"))
    assert asked > 300 and not alarms


def test_another_draw_asks_with_other_values() -> None:
    import torch

    from grpo_conformance.ops.question import drawn, seeded

    def values() -> torch.Tensor:
        return torch.rand(3, generator=seeded(3))

    plain = values()
    with drawn(0):
        assert torch.equal(values(), plain)
    with drawn(1):
        assert not torch.equal(values(), plain)
    assert torch.equal(values(), plain)


def target_of(name: str) -> Target:
    return open_mutated(by_name(name))


def test_a_plugin_that_cannot_be_imported_is_asked_about() -> None:
    ids = {case.id for case in cases_for(by_name("crash at import"), target_of("crash at import"))}
    assert "plugin/mutant/import" in ids
