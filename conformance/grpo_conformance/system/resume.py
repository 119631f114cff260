"""A run that goes on from a checkpoint is the run that was never stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core import loop
from grpo_core.checkpoint import checkpoints, latest_checkpoint, read_state
from grpo_core.errors import PlanError
from grpo_core.plan import load_plan
from grpo_core.rundir import PLAN, drop_after
from grpo_core.session import RunWriter

from ..case import Outcome, Target, failed
from .runs import Lab, Record, built, deterministic, open_lab, scratch, undeclared
from .sleep import bits, tensors_of
from .trajectory import course, follow

if TYPE_CHECKING:
    from grpo_core.planning import PlannedRun

STEPS, CUT = 4, 2


class Silent:
    """A `Progress` that nobody sees."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Written(Record):
    """A record that writes the checkpoints of a run folder, too."""

    writer: RunWriter

    def save(self, step: int) -> None:
        """As `grpo train` does."""
        self.writer.save(step)


def resume(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """Four steps, and two of them again from the checkpoint after the second."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    changes: dict[str, Any] = {"train__dtype": dtype, "train__steps": STEPS, "run__save_every": CUT}
    try:
        planned = lab.plan(**changes)
    except PlanError as error:
        return undeclared(error)
    whole, cut = scratch("whole"), scratch("cut")
    planned.plan.save(whole / PLAN)
    first = _go(planned, whole)
    shutil.copytree(whole, cut, dirs_exist_ok=True)
    drop_after(cut, CUT)
    again = lab.plan(**changes, earlier=load_plan(cut / PLAN))
    second = _go(again, cut)
    ends = [tensors_of(latest_checkpoint(folder) or folder) for folder in (whole, cut)]
    rest = Record(rows=first.rows[CUT:], scored=first.scored[CUT:])
    figures = {"steps": float(len(second.rows)), "checkpoints": float(len(checkpoints(cut)))}
    if len(second.rows) != STEPS - CUT:
        return failed(f"{len(second.rows)} steps were done after the checkpoint", figures=figures)
    if deterministic(planned):
        return bits(second, rest, ends[1], ends[0], figures, of="the run that goes on")
    joined = Record(rows=first.rows[:CUT] + second.rows, scored=first.scored[:CUT] + second.scored)
    outcome = follow(joined, first, course(lab, dtype=dtype, steps=STEPS, full=False), dtype=dtype)
    exact = bits(second, rest, ends[1], ends[0], figures, of="the run that goes on").status == "pass"
    return replace(outcome, figures={**outcome.figures, "bit for bit": float(exact)})


def _go(planned: PlannedRun, folder: Path) -> Record:
    """The steps that are left to do in a run folder."""
    checkpoint = latest_checkpoint(folder)
    begin = read_state(checkpoint).step if checkpoint else 0
    record = Written()
    with built(planned, resume_from=checkpoint) as parts:
        record.writer = RunWriter(
            planned=planned, parts=parts, run_dir=folder, trackers=(), progress=Silent()
        )
        loop.train(parts, record, first_step=begin)
    return record
