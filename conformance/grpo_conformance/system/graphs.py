"""Decode steps through device graphs against the same steps without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_core.errors import PlanError

from ..case import Outcome, Target, failed, passed
from .bands import ROUNDING
from .runs import Lab, built, deterministic, open_lab, undeclared
from .sync import apart, told

if TYPE_CHECKING:
    from grpo_core.loop import Parts
    from grpo_core.planning import PlannedRun

FEW: dict[str, Any] = {"rollout__prompts": 1, "rollout__sleep": False}
"""Eight rows at most: up to there a graph has no row too many, so that it does the same work."""


def graphs(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """Recorded steps say what plain ones say: at first, with new weights in their places, after a sleep; bit
    for bit where the plan's offers are deterministic."""
    lab = open_lab(target, kind, draw)
    return compared(lab, dtype) if isinstance(lab, Lab) else undeclared(lab)


def compared(lab: Lab, dtype: str) -> Outcome:
    """The same for a model's files."""
    try:
        recorded = lab.plan(**FEW, train__dtype=dtype)
        plain = lab.plan(**FEW, train__dtype=dtype, rollout__graph="off")
        other = lab.plan(**FEW, train__dtype=dtype, model=lab.other)
    except PlanError as error:
        return undeclared(error)
    if not recorded.graph:
        notes = [note for note in recorded.plan.notes if "graphs" in note]
        return undeclared(notes[0] if notes else f"device {lab.target.device.name} has no graphs")
    with built(recorded) as a, built(plain) as b, built(other) as c:
        return _compared(a, b, c, recorded, ROUNDING[dtype])


def _compared(a: Parts, b: Parts, c: Parts, planned: PlannedRun, rounding: float) -> Outcome:
    first = told(b)
    band = 0.0 if deterministic(planned) else 4 * apart(told(b), first) + 8 * rounding
    pairs = {"at first": (told(a), first)}
    captures = graphs_of(a)["captures"]
    if not captures or b.rollout.describe()["graphs"] is not None:
        return failed(
            f"{captures} graphs were recorded, and {b.rollout.describe()['graphs']} when they are off"
        )
    weights = list(c.trainer.weights())
    for parts in (a, b):
        parts.rollout.load_weights(weights, 2)
    pairs["with new weights"] = told(a), told(b)
    if graphs_of(a)["captures"] != captures:
        return failed("new weights in their places make all graphs be recorded again")
    a.rollout.sleep()
    a.rollout.load_weights(weights, 3)
    pairs["after a sleep"] = told(a), told(b)
    errors = {when: apart(*pair) for when, pair in pairs.items()}
    when = max(errors, key=lambda name: errors[name])
    found: dict[str, Any] = {"error": errors[when], "tolerance": band, "worst": {"of": when}}
    if not errors[when] <= band:
        return failed(f"{when}: log-probs of greedy tokens differ by {errors[when]:.2e}", **found)
    if apart(pairs["with new weights"][0], pairs["at first"][0]) <= 4 * band:
        return failed("new weights change nothing of what recorded steps say", **found)
    return passed(**found)


def graphs_of(parts: Parts) -> dict[str, Any]:
    """What the engine tells of its graphs."""
    found: dict[str, Any] = parts.rollout.describe()["graphs"] or {"captures": 0, "rows": [], "bytes": 0}
    return found
