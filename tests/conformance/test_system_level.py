"""Whole runs: the healthy devices pass, and what goes wrong only in a run is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from faulty_system import outcome_of

from grpo_conformance.collect import collect
from grpo_conformance.sim import build as building
from grpo_conformance.system import trajectory
from grpo_conformance.system.agreement import agreement
from grpo_conformance.system.runs import Record
from grpo_conformance.target import open_target
from grpo_core.plugins import load
from grpo_core.types import Completion, Sample, Scored

DENSE32: dict[str, Any] = {"kind": "dense", "dtype": "float32"}
MLA32: dict[str, Any] = {"kind": "mla", "dtype": "float32"}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
FAULTS: list[tuple[str, str, dict[str, Any], str]] = [
    ("skips one", "sync:sync", DENSE32, "other weights from a trainer"),
    ("loses a page", "sleep:sleep", {**DENSE32, "keep": "host"}, "wake with another content"),
    ("loses a moment", "sleep:sleep", {**DENSE32, "keep": "disk"}, "the run that sleeps"),
    ("own dice", "resume:resume", DENSE32, "the run that goes on"),
    ("untempered", "agreement:agreement", DENSE32, "rollout and trainer"),
    ("deaf", "replay:replay", MLA32, "not those of the rollout"),
    ("deaf", "replay:old_pass", MLA32, "not those of the pass"),
    ("pretends", "replay:forced", {"kind": "mla"}, "log-probs with given experts"),
    ("numb", "replay:replay", {"kind": "gated_delta", "dtype": "bfloat16"}, "no gradient reaches"),
    ("uncorrected", "trajectory:trajectory", {"kind": "dense", "steps": 3}, "step 2"),
    ("forgetful", "trajectory:trajectory", {"kind": "dense", "steps": 3}, "is off by"),
    ("own dice", "trajectory:trajectory", {"kind": "dense", "steps": 3}, "completions of 8 prompts"),
    ("crowded", "agreement:consistent", DENSE32, "log-probs differ"),
]


@pytest.mark.parametrize(("fault", "check", "args", "told"), FAULTS)
def test_a_fault_of_a_whole_run_is_told(fault: str, check: str, args: dict[str, Any], told: str) -> None:
    outcome = outcome_of(fault, "cpu", check, args)
    assert outcome.status == "fail"
    assert told in outcome.message, outcome.message


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "check", "told"),
    [("", "sleep:sleep", ""), ("frees nothing", "sleep:sleep", "the trainer's sleep frees 0 bytes")],
)
def test_memory_that_sleep_does_not_free_is_told(fault: str, check: str, told: str) -> None:
    """On a device, whose account covers everything; in a process of its own."""
    building.build(Path.home() / building.CACHE)
    script = Path(__file__).with_name("faulty_system.py")
    words = [fault, check, "kind=dense", "dtype=float32", "keep=host"]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["status"] == ("fail" if fault else "pass"), outcome["message"]
    assert told in outcome["message"]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("sim", marks=needs_compiler)])
def test_the_healthy_devices_pass(device: str, tmp_path: Path) -> None:
    if device == "sim":
        building.build(Path.home() / building.CACHE)
    report = tmp_path / "report.json"
    words = ["conformance", device, "--level", "system", "--quick", "--json", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "grpo_core.cli.main", *words],
        capture_output=True, text=True, timeout=290, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["id"]: row for row in json.loads(report.read_text())["cases"]}
    optional = ("consistent", "graphs")
    statuses = {row["status"] for name, row in rows.items() if not any(word in name for word in optional)}
    assert statuses == {"pass"}
    # A CPU has no graphs; the simulated device has them where every op of a kind declares so.
    graphs = {row["status"] for name, row in rows.items() if "graphs" in name}
    assert graphs == {"not_declared"} if device == "cpu" else "pass" in graphs <= {"pass", "not_declared"}
    # Only the CPU's offers declare that a row's bits depend on that row alone.
    consistent = {row["status"] for name, row in rows.items() if "consistent" in name}
    assert consistent == {"pass" if device == "cpu" else "not_declared"}
    assert rows["system/dense/trajectory/5"]["figures"]["steps followed"] >= 2


def test_a_kind_of_model_that_no_family_serves_is_not_declared() -> None:
    target = open_target("cpu", replace(load(), models=MappingProxyType({})))
    outcome = agreement(target, **DENSE32)
    assert outcome.status == "not_declared" and "Qwen3ForCausalLM" in outcome.message


def test_an_op_that_the_device_does_not_have_is_not_declared_with_the_plans_reason() -> None:
    catalogue = load()
    offers = {op: rows for op, rows in catalogue.offers.items() if op != "mla.varlen"}
    outcome = agreement(open_target("cpu", replace(catalogue, offers=MappingProxyType(offers))), **MLA32)
    assert outcome.status == "not_declared" and "nothing serves mla.varlen on cpu" in outcome.message


def test_cases_follow_what_the_device_declares() -> None:
    target = open_target("cpu")
    quick = collect(target, levels=[5], quick=True)
    whole = collect(target, levels=[5], quick=False)
    assert len(quick) < len(whole)
    assert not any("gated_delta" in case.id for case in quick)
    assert {case.args["kind"] for case in whole} == {"dense", "gated_delta", "mla"}
    info = replace(target.probe.info, dtypes=frozenset({"bfloat16"}))
    coarse = collect(replace(target, probe=replace(target.probe, info=info)), levels=[5], quick=False)
    assert coarse and not any("float32" in case.id or "trajectory" in case.id for case in coarse)


def run_of(*steps: tuple[float, dict[int, tuple[int, ...]]]) -> Record:
    """A record of rewards, and of each prompt's tokens, all drawn with log-prob -1."""
    record = Record()
    for reward, drawn in steps:
        scored = [
            Scored(
                sample=Sample(id="s"), prompt_token_ids=(4,), rewards={}, reward=reward,
                completion=Completion(
                    prompt_id=prompt, index=0, token_ids=ids, text="", logprobs=(-1.0,) * len(ids),
                    logprobs_t1=(-1.0,) * len(ids), finish_reason="length", weight_version=0,
                ),
            )
            for prompt, ids in drawn.items()
        ]  # fmt: skip
        record.rows.append({"reward/mean": reward, "policy/grad_norm": 1.0})
        record.scored.append(scored)
    return record


SAME = dict.fromkeys(range(8), (4, 5, 6))
ONE_APART = {**SAME, 3: (4, 5, 7)}


def followed(got: Record, *, rising: float = 0.0) -> Any:
    """Held against a run of three steps with the same tokens in each, and a twin that equals it."""
    wanted = run_of((0.1, SAME), (0.1, SAME), (0.1 + rising, SAME))
    course = trajectory.Course(record=wanted, twins=(wanted,))
    return trajectory.follow(got, wanted, course, dtype="float32")


def test_a_run_may_part_at_a_single_token_and_is_followed_until_there() -> None:
    outcome = followed(run_of((0.1, SAME), (0.2, ONE_APART), (0.3, ONE_APART)))
    assert outcome.status == "pass" and outcome.figures["steps followed"] == 2


def test_a_run_that_parts_in_most_prompts_at_once_is_told() -> None:
    elsewhere = dict.fromkeys(range(8), (5, 5, 5))
    outcome = followed(run_of((0.1, SAME), (0.1, elsewhere), (0.1, elsewhere)))
    assert outcome.status == "fail" and "completions of 8 prompts differ" in outcome.message


def test_a_run_that_parts_and_learns_nothing_is_told() -> None:
    outcome = followed(run_of((0.1, SAME), (0.1, ONE_APART), (0.1, ONE_APART)), rising=0.5)
    assert outcome.status == "fail" and "the reward rises by 0.00" in outcome.message


def test_a_small_rise_of_the_references_is_not_told_from_chance() -> None:
    """Draw 8 of the gated delta model: the references rose by 0.10, the sound device by -0.02."""
    outcome = followed(run_of((0.1, SAME), (0.1, ONE_APART), (0.08, ONE_APART)), rising=0.10)
    assert outcome.status == "pass" and outcome.figures["rise"] < 0
    record = Record(rows=[{"reward/mean": 0.0}] * 10)
    assert trajectory.shortfall(record) == pytest.approx(3 * 192**-0.5)


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_metric_outside_of_the_band_is_told_with_its_step(value: float) -> None:
    got = run_of((0.1, SAME), (0.1, SAME), (0.1, SAME))
    got.rows[1]["policy/grad_norm"] = value
    outcome = followed(got)
    assert outcome.status == "fail" and outcome.worst == {"step": 2, "of": "policy/grad_norm"}


def test_the_band_ends_where_the_references_part_from_themselves() -> None:
    wanted = run_of((0.1, SAME), (0.1, SAME), (0.1, SAME))
    twin = run_of((0.1, SAME), (0.1, ONE_APART), (0.1, ONE_APART))
    course = trajectory.Course(record=wanted, twins=(twin,))
    assert [course.distance(step) for step in range(3)] == [0.0, 0.0, None]
