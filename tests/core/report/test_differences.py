"""Runs laid over each other: where they part, how far apart they are, and how far right ones may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from grpo_core.report.compared import verdict
from grpo_core.report.differences import FLOOR, MULTIPLE, ROUNDING, Comparison, allowance, compare
from grpo_core.report.html import write_report
from grpo_core.report.read import RunData, read_runs

STEPS = 6
Off = Callable[[int], float]


def make(
    folder: Path, off: Off = lambda step: 0.0, *, parts: int | None = None, changed: int = 1,
    device: str = "cpu", dtype: str = "float32", offer: str = "cpu:torch", lr: float = 0.1,
) -> Path:  # fmt: skip
    """A run whose loss is off; from step `parts` on some of its four prompts are completed otherwise."""
    folder.mkdir(parents=True)
    rows, kept = [], []
    for step in range(1, STEPS + 1):
        rows.append(
            {
                "step": step, "policy/loss": 0.5 / step + off(step), "policy/total_loss": 1.0 / step,
                "policy/grad_norm": 4.0, "reward/mean": step / 10, "policy/tokens": 32.0,
                "policy/clip_fraction": off(step), "time/step": 1.0,
            }
        )  # fmt: skip
        for prompt in range(4):
            other = parts is not None and step >= parts and prompt < changed
            answer = "other" if other else "same"
            kept += [
                {"step": step, "prompt": f"prompt {prompt}", "completion": answer, "reward": 0.0}
                for _ in range(2)
            ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    choices = [
        {"op": "norm.rms", "chosen": offer, "facts": [{"dtype": dtype}]},
        {"op": "mlp.swiglu", "chosen": "core:reference", "facts": [{"dtype": dtype}]},
    ]
    chip = {"type": device, "name": f"Chip {device}", "vendor": "Maker"}
    (folder / "plan.json").write_text(json.dumps({"id": "1", "device": chip, "choices": choices}))
    (folder / "config.yaml").write_text(json.dumps({"device": device, "train": {"lr": lr}}))
    return folder


def one(tmp_path: Path, twin: Off | None, **run: object) -> Comparison:
    """A run beside the first, with one twin or none."""
    first, other = make(tmp_path / "first"), make(tmp_path / "other", **run)  # type: ignore[arg-type]
    twins = [make(tmp_path / "twin", twin)] if twin is not None else []
    (found,) = compare(read_runs([first, other]), read_runs(twins))
    return found


def test_the_allowance_is_the_furthest_twin_so_far(tmp_path: Path) -> None:
    first, near = make(tmp_path / "a"), make(tmp_path / "b", lambda step: 1e-6 * (step == 2))
    far = make(tmp_path / "c", lambda step: 1e-5 * (step == 4))
    band = dict(allowance(*_runs(first, near, far)))
    floor = FLOOR * ROUNDING["float32"]
    assert band[1] == floor
    assert band[2] == band[3] == pytest.approx(MULTIPLE * 1e-6 + floor, rel=1e-6)
    assert band[4] == band[6] == pytest.approx(MULTIPLE * 1e-5 + floor, rel=1e-6)


def test_the_allowance_ends_where_the_last_twin_parts(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    short, long = make(tmp_path / "b", parts=2), make(tmp_path / "c", parts=4)
    assert [step for step, _ in allowance(*_runs(first, short, long))] == [1, 2, 3]


def test_differences_are_relative_to_large_values_only(tmp_path: Path) -> None:
    found = one(tmp_path, None, off=lambda step: 0.25 * (step == 3))
    by_name = {row.name: row for row in found.differences}
    assert by_name["policy/loss"].off == pytest.approx(0.25)
    assert by_name["policy/loss"].relative == pytest.approx(0.25)
    assert by_name["policy/loss"].step == 3
    assert by_name["policy/grad_norm"].off == 0
    assert found.differences[0].name == "policy/loss"
    # Shares jump, and times are no run's own.
    assert not {"policy/clip_fraction", "time/step"} & set(by_name)


@pytest.mark.parametrize(("size", "good"), [(1e-5, True), (1e-3, False), (float("nan"), False)])
def test_within_and_outside_of_the_band(tmp_path: Path, size: float, good: bool) -> None:
    found = one(tmp_path, lambda step: 1e-6 * step, off=lambda step: size if step == 5 else 0.0)
    assert (found.problem == "") == good
    if not good:
        assert found.problem.startswith("step 5: off by")
        assert "not within" in verdict(found)


def test_without_twins_nothing_is_judged(tmp_path: Path) -> None:
    found = one(tmp_path, None, off=lambda step: 1.0)
    assert found.problem == ""
    assert found.allowed == []
    assert "6 of 6 steps with the same completions" in verdict(found)


def test_what_follows_other_completions_is_not_compared(tmp_path: Path) -> None:
    found = one(tmp_path, lambda step: 0.0, off=lambda step: 1.0 * (step >= 4), parts=4, changed=2)
    assert (found.parted, found.apart, found.followed) == (4, (4, 8), 3)
    assert found.problem == ""
    assert "in step 4 4 of 8 completions were drawn otherwise" in verdict(found)


def test_a_device_that_draws_otherwise_everywhere_is_noticed(tmp_path: Path) -> None:
    found = one(tmp_path, lambda step: 0.0, parts=1, changed=4)
    assert "step 1: 4 of 4 prompts are completed otherwise" in found.problem


def test_many_may_part_where_the_band_is_wide(tmp_path: Path) -> None:
    # 32 tokens over 4 prompts: with an allowance of an eighth a draw of each is expected to move.
    found = one(tmp_path, lambda step: 0.01 * step, parts=3, changed=4)
    assert dict(found.allowed)[3] > 1 / 8
    assert found.problem == ""


@pytest.mark.parametrize(("changed", "good"), [(2, True), (4, False)])
def test_a_parting_is_judged_where_every_twin_has_parted(tmp_path: Path, changed: int, good: bool) -> None:
    first, twin = make(tmp_path / "first"), make(tmp_path / "twin", parts=1, changed=1)
    other = make(tmp_path / "other", parts=1, changed=changed)
    (found,) = compare(read_runs([first, other]), read_runs([twin]))
    assert found.allowed == []
    assert (found.problem == "") == good
    if good:
        assert verdict(found).startswith("0 of 6 steps with the same completions; in step 1")
        assert "a twin tells nothing" in verdict(found)


def test_no_more_is_asked_of_a_run_than_twins_do(tmp_path: Path) -> None:
    first, twin = make(tmp_path / "first"), make(tmp_path / "twin", parts=1, changed=4)
    (found,) = compare(read_runs([first, make(tmp_path / "other", parts=1, changed=4)]), read_runs([twin]))
    assert found.problem == ""


def test_a_run_with_other_steps_is_compared_where_both_have_them(tmp_path: Path) -> None:
    first, other = make(tmp_path / "a"), make(tmp_path / "b")
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[:2]) + '{"step": 3, "eval/x/reward": 1.0}\n')
    (found,) = compare(read_runs([first, other]))
    assert found.steps == found.followed == 2


def test_no_step_in_common_is_a_problem(tmp_path: Path) -> None:
    first, other, twin = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c")
    (other / "metrics.jsonl").write_text("")
    (found,) = compare(read_runs([first, other]), read_runs([twin]))
    assert found.problem == "no step in common"


def test_the_page_tells_what_differs(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / "cpu"),
        make(tmp_path / "sim", lambda step: 1e-7, device="sim", offer="sim:plain"),
        make(tmp_path / "ascend", lambda step: 0.5, device="npu", offer="ascend:npu", lr=0.2),
    ]
    twin = make(tmp_path / "twin", lambda step: 1e-7)
    page = write_report(runs, tmp_path / "r.html", twins=[twin]).read_text()
    assert page.count('aria-label="Distance from cpu"') == 1
    assert page.count('class="verdict good"') == page.count('class="verdict bad"') == 1
    for shown in (
        "cpu, sim and ascend",
        "ascend:npu",
        "sim:plain",
        "train.lr",
        "Chip npu",
        "float32",
        "allowed",
    ):
        assert shown in page
    # What all have in common is not told.
    assert "mlp.swiglu</code></td><td><code>core:reference</code></td><td><code>core:reference" not in page
    assert "run.dir" not in page


def test_curves_that_coincide_can_all_be_seen(tmp_path: Path) -> None:
    page = write_report([make(tmp_path / "a"), make(tmp_path / "b")], tmp_path / "r.html").read_text()
    assert page.count('class="curve under"') == page.count('class="curve"') - 1 > 2


def test_equal_runs_are_drawn(tmp_path: Path) -> None:
    runs = [make(tmp_path / "a"), make(tmp_path / "b")]
    page = write_report(runs, tmp_path / "r.html", twins=[runs[0]]).read_text()
    assert "1e-09" in page
    assert "at most 0% of what is allowed" in page


def _runs(first: Path, *twins: Path) -> tuple[RunData, list[RunData]]:
    found = read_runs([first, *twins])
    return found[0], found[1:]
