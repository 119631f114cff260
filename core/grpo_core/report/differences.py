"""How far runs of one configuration are apart, and whether that is within what roundings explain.

Two right runs do not stay together for ever: roundings grow from step to step, until a token is drawn from
the other side of a boundary; from there on both are runs of their own. How fast that goes is measured by
twins: runs like the first, from weights that were each changed by one rounding of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .read import RunData

FOLLOWED = ("policy/loss", "policy/total_loss", "policy/grad_norm", "policy/entropy", "policy/kl",
            "policy/approx_kl", "policy/lr", "reward/", "advantage/", "length/")  # fmt: skip
"""Beginnings of the metrics that are compared: shares of clipped tokens and the like jump."""
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""The largest relative error of rounding to nearest."""
MULTIPLE = 16.0
"""By what a run may be further off than the furthest twin: a device errs in every op by several roundings
(4) where a twin errs once a weight, and two twins are a small sample of a distance that varies (4)."""
FLOOR = 64.0
"""Roundings that any comparison may be off by, where twins happen to agree."""
APART = 0.5
"""Share of a step's prompts whose completions may be drawn otherwise in the step where runs part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One metric of a run beside the first's, up to where they part."""

    name: str
    off: float
    """Largest absolute difference; NaN where only one of them is finite."""
    relative: float
    """The same over max(1, the first's value)."""
    step: float
    """Where that is."""
    first: float
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run beside the first."""

    run: RunData
    first: RunData
    differences: Sequence[Difference]
    """The largest first."""
    gaps: Sequence[tuple[float, float]]
    """(step, largest relative difference of a followed metric), up to where the runs part."""
    allowed: Sequence[tuple[float, float]]
    """(step, what that may be), as far as a twin tells; empty without twins."""
    steps: int
    """Steps that both have."""
    parted: float | None
    """The first step whose completions differ, as far as they were kept."""
    apart: tuple[int, int]
    """Completions that differ there, of how many."""
    twins: int
    """Runs that tell what is allowed."""
    problem: str
    """Why the run is not the first's within roundings; empty if it is, or if there are no twins."""

    @property
    def followed(self) -> int:
        """Steps with equal completions."""
        return len(self.gaps)


def compare(runs: Sequence[RunData], twins: Sequence[RunData] = ()) -> list[Comparison]:
    """Each run after the first beside the first."""
    first, *others = runs
    band = allowance(first, twins) if twins else []
    return [_compare(first, run, twins, band) for run in others]


def _compare(
    first: RunData, run: RunData, twins: Sequence[RunData], band: list[tuple[float, float]]
) -> Comparison:
    steps = _shared_steps(first, run)
    parted, apart, prompts = _parting(first, run, steps)
    together = [step for step in steps if parted is None or step < parted]
    found = sorted(_differences(first, run, together), key=lambda row: (row.off == row.off, -row.relative))
    gaps = [(step, gap(first, run, step)) for step in together]
    return Comparison(
        run=run, first=first, differences=found, gaps=gaps, allowed=band, steps=len(steps), parted=parted,
        apart=apart, twins=len(twins),
        problem=_problem(first, gaps, band, steps, parted, prompts, _apart(first, twins)) if twins else "",
    )  # fmt: skip


def allowance(first: RunData, twins: Sequence[RunData]) -> list[tuple[float, float]]:
    """(step, relative difference that two right runs may have), up to where the last twin parts."""
    rounding = ROUNDING[dtype_of(first)]
    reach: dict[float, float] = {}
    for twin in twins:
        steps = _shared_steps(first, twin)
        parted, _, _ = _parting(first, twin, steps)
        largest = 0.0
        for step in steps:
            if parted is not None and step >= parted:
                break
            largest = max(largest, gap(first, twin, step))
            reach[step] = max(reach.get(step, 0.0), largest)
    band, largest = [], 0.0
    for step in sorted(reach):
        largest = max(largest, reach[step])
        band.append((step, MULTIPLE * largest + FLOOR * rounding))
    return band


def gap(first: RunData, run: RunData, step: float) -> float:
    """The largest relative difference of a followed metric in a step; infinite where one is not a number."""
    ours, theirs = first.row(step), run.row(step)
    gaps = [0.0]
    for name in ours:
        if name.startswith(FOLLOWED):
            mine, other = _number(ours[name]), _number(theirs.get(name))
            if mine is None or other is None:
                gaps.append(0.0 if mine is other else float("inf"))
            else:
                gaps.append(abs(mine - other) / max(1.0, abs(mine)))
    return max(gaps)


def dtype_of(run: RunData) -> str:
    """What the run computed in, by its plan, else its settings; bfloat16 where neither tells."""
    seen = {
        facts.get("dtype")
        for row in run.plan.get("choices", ())
        if isinstance(row, dict) and not str(row.get("op", "")).startswith(("optim.", "memory.", "comm."))
        for facts in row.get("facts", ())
        if isinstance(facts, dict)
    }
    for dtype in ("bfloat16", "float32"):
        if dtype in seen:
            return dtype
    train = run.config.get("train")
    named = train.get("dtype") if isinstance(train, dict) else None
    return named if named in ROUNDING else "bfloat16"


def _problem(
    first: RunData, gaps: Sequence[tuple[float, float]], band: Sequence[tuple[float, float]],
    steps: Sequence[float], parted: float | None, prompts: tuple[int, int], usual: float,
) -> str:  # fmt: skip
    """Why a run is not the first's within the band; empty where it is."""
    limit = dict(band)
    for step, off in gaps:
        if step in limit and not off <= limit[step]:
            return f"step {step:g}: off by {off:.2e}, {limit[step]:.2e} is allowed"
    if not steps:
        return "no step in common"
    if parted is None or prompts[0] <= max(APART, usual) * prompts[1]:
        return ""
    # A draw falls on the other side of a boundary that has moved by so much with that probability, at most.
    tokens = _number(first.row(parted).get("policy/tokens")) or 0.0
    if tokens / prompts[1] * limit.get(parted, band[-1][1] if band else 0.0) >= 1:
        return ""
    return f"step {parted:g}: {prompts[0]} of {prompts[1]} prompts are completed otherwise"


def _differences(first: RunData, run: RunData, steps: Sequence[float]) -> Iterator[Difference]:
    """Of each followed metric that both have."""
    for name in first.names():
        ours, theirs = dict(first.points(name)), dict(run.points(name))
        pairs = [(step, ours[step], theirs[step]) for step in steps if step in ours and step in theirs]
        if not name.startswith(FOLLOWED) or not pairs:
            continue
        off, step, mine, other = max(map(_off, pairs), key=lambda row: (row[0] != row[0], row[0]))
        relative = off / max(1.0, abs(mine)) if off == off else float("inf")
        yield Difference(name=name, off=off, relative=relative, step=step, first=mine, value=other)


def _off(pair: tuple[float, float | None, float | None]) -> tuple[float, float, float, float]:
    step, mine, other = pair
    if mine is None or other is None:
        nan = float("nan")
        both = mine is other
        return (0.0 if both else nan, step, nan if mine is None else mine, nan if other is None else other)
    return abs(mine - other), step, mine, other


def _parting(
    first: RunData, run: RunData, steps: Sequence[float]
) -> tuple[float | None, tuple[int, int], tuple[int, int]]:
    """The first step whose kept completions differ, with (completions, of all) and (prompts, of all)."""
    for step in steps:
        ours, theirs = first.completions(step), run.completions(step)
        pairs = list(zip(ours, theirs, strict=False))
        other = [ours for ours, theirs in pairs if ours != theirs]
        if other:
            asked = {prompt for prompt, _ in ours}
            changed = {prompt for prompt, _ in other}
            return step, (len(other), len(pairs)), (len(changed), len(asked))
    return None, (0, 0), (0, 0)


def _apart(first: RunData, twins: Sequence[RunData]) -> float:
    """Largest share of prompts that a twin completes otherwise where it parts."""
    found = [_parting(first, twin, _shared_steps(first, twin))[2] for twin in twins]
    return max((changed / asked for changed, asked in found if asked), default=0.0)


def _shared_steps(first: RunData, run: RunData) -> list[float]:
    """Steps whose metrics both have, whole: evaluations alone are none."""
    mine, other = ({x for x, _ in one.points("reward/mean")} for one in (first, run))
    return sorted(mine & other)


def _number(value: object) -> float | None:
    """None for what is no finite number: runs write null then."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
