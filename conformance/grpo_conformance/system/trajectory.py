"""A short run on the device follows the references' run on the CPU.

Two right runs do not stay together for ever: roundings grow from step to step (AdamW divides by small
numbers), until a token is drawn from the other side of a boundary or goes to other experts, and from there
on both are runs of their own. How fast that goes is measured: `twins` are runs of the references from weights
that are changed by one rounding each. The device must stay within a multiple of the twins' distance up to
where runs part; no more than half of the prompts may part there, unless the distance explains it; and after
that its reward must rise as theirs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from grpo_core.errors import PlanError

from ..case import Outcome, Target, failed, passed
from .bands import ROUNDING
from .models import jolt
from .runs import Lab, Record, open_lab, path_of, run, scratch, undeclared
from .task import GROUP, PROMPTS, TOKENS

if TYPE_CHECKING:
    from grpo_core.types import Scored

LR = 1e-2
"""Learning rate."""
MULTIPLE = 16.0
"""A device errs in every op by several roundings (4, as the level of ops allows), where a twin errs once a
weight; two twins are a small sample of a distance whose logarithm varies (4)."""
FLOOR = 64.0
"""Roundings of float32 that any comparison may be off by, where twins happen to agree."""
TWINS = 2
APART = 0.5
"""Share of a step's prompts whose completions may part in one step: a near tie between experts may be that of
a token which several prompts hold. Where the device draws otherwise, all part."""
FOLLOWED = ("policy/loss", "policy/total_loss", "policy/grad_norm", "policy/entropy", "policy/kl",
            "policy/approx_kl", "policy/lr", "reward/", "advantage/", "length/")  # fmt: skip
"""Beginnings of the metrics that are compared: shares of clipped tokens and the like jump."""
RISE = 0.25
"""Share of the references' rise in reward that a run which parted must reach, as far as chance tells."""
DEVIATIONS = 3.0
"""Of the difference between the rises of two runs that have parted and learn equally well. Rewards are 0 or
1, so that a mean of n has a variance of 1 / (4 n) at most, and a difference of two rises, four means, one of
1 / n: with a third of ten steps, 192 completions, three deviations are 0.22. The references rise by 0.27 and
more with the weights that a run of the suite has."""
SETTINGS: Mapping[str, Any] = {
    "train__lr": LR, "train__weight_decay": 0.1, "algo__mini_batches": 2, "algo__kl_coef": 0.01,
}  # fmt: skip
"""Of the trajectory: old log-probs, the frozen reference and decay take part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The references' run with its twins."""

    record: Record
    twins: tuple[Record, ...]

    def distance(self, step: int) -> float | None:
        """Largest gap of a twin up to a step, or None where all have parted before."""
        largest, alive = 0.0, False
        for twin in self.twins:
            for at in range(step + 1):
                largest = max(largest, gap(twin, self.record, at))
                if twin.paths(at) != self.record.paths(at):
                    alive |= at == step
                    break
            else:
                alive = True
        return largest if alive else None


@cache
def course(lab: Lab, *, dtype: str, steps: int, full: bool) -> Course:
    """On the CPU, once a process; `full` has the trajectory's settings."""
    changes = {**(SETTINGS if full else {}), "train__dtype": dtype, "train__steps": steps}
    models = [jolt(lab.model, scratch("twin"), ROUNDING[dtype], seed=seed) for seed in range(1, TWINS + 1)]
    return Course(
        record=run(lab.plan(cpu=True, **changes)),
        twins=tuple(run(lab.plan(cpu=True, model=model, **changes)) for model in models),
    )


def trajectory(target: Target, *, kind: str, steps: int, draw: int = 0) -> Outcome:
    """Losses, entropies, gradient norms, rewards and every log-prob of a run in float32."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    try:
        planned = lab.plan(train__steps=steps, train__dtype="float32", **SETTINGS)
    except PlanError as error:
        return undeclared(error)
    got = run(planned)
    wanted = course(lab, dtype="float32", steps=steps, full=True)
    return follow(got, wanted.record, wanted, dtype="float32")


def follow(got: Record, wanted: Record, band: Course, *, dtype: str) -> Outcome:
    """Compare two runs step by step within the band of the course."""
    worst: dict[str, float | str] = {}
    share, error, tolerance, parted = 0.0, 0.0, 0.0, 0
    for step in range(len(wanted.rows)):
        distance = band.distance(step)
        if distance is None:
            break
        allowed = MULTIPLE * distance + FLOOR * ROUNDING[dtype]
        off, name = largest_gap(got, wanted, step)
        if not off / allowed <= share:
            share, error, tolerance = off / allowed, off, allowed
            worst = {"step": step + 1, "of": name}
        pairs = zip(got.paths(step), wanted.paths(step), strict=True)
        apart = len({y[0] for x, y in pairs if x != y})
        if not share <= 1 or (apart > APART * PROMPTS and not explained(allowed)):
            break
        if apart:
            parted = step + 1
            break
    followed = (parted or step + 1) if share <= 1 else step
    figures = {
        "steps followed": float(followed), "first reward": wanted.rows[0]["reward/mean"],
        "rise": rise(got), "rise of the reference": rise(wanted),
    }  # fmt: skip
    found = {"error": error, "tolerance": tolerance, "worst": worst, "figures": figures}
    if not share <= 1:
        return failed(
            f"step {worst['step']}: {worst['of']} is off by {error:.2e}, {tolerance:.2e} is allowed", **found
        )
    if apart and not parted:
        return failed(
            f"step {step + 1}: completions of {apart} prompts differ, which no log-prob explains", **found
        )
    if parted and rise(wanted) - rise(got) > shortfall(wanted):
        return failed(f"the reward rises by {rise(got):.2f}, on the CPU by {rise(wanted):.2f}", **found)
    return passed(**found)


def explained(allowed: float) -> bool:
    """Whether completions of every prompt may part where log-probs may be off by so much: a draw falls on the
    other side of a boundary that has moved by `allowed` with that probability, at most."""
    return GROUP * TOKENS * allowed >= 1


def rise(record: Record) -> float:
    """Mean reward of the last third of the steps above that of the first."""
    rewards = [row["reward/mean"] for row in record.rows]
    part = third(record)
    return statistics.fmean(rewards[-part:]) - statistics.fmean(rewards[:part])


def third(record: Record) -> int:
    """Steps of which a rise takes the mean."""
    return max(1, len(record.rows) // 3)


def shortfall(wanted: Record) -> float:
    """By how much the rise of a run that parted may be less than the references'."""
    chance = DEVIATIONS / math.sqrt(third(wanted) * PROMPTS * GROUP)
    return max((1 - RISE) * rise(wanted), chance)


def gap(got: Record, wanted: Record, step: int) -> float:
    """See `largest_gap`."""
    return largest_gap(got, wanted, step)[0]


def largest_gap(got: Record, wanted: Record, step: int) -> tuple[float, str]:
    """The largest difference of a step with its name: of log-probs in nats, up to where tokens part, and,
    where none parts, of metrics relative to max(1, the wanted)."""
    rows = [(logprob_gap(got.scored[step], wanted.scored[step]), "a log-prob of the rollout")]
    if got.paths(step) == wanted.paths(step):
        ours, theirs = got.rows[step], wanted.rows[step]
        for name in theirs:
            if name.startswith(FOLLOWED):
                rows.append((abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name])), name))
    bad = [row for row in rows if row[0] != row[0]]
    return bad[0] if bad else max(rows)


def logprob_gap(got: Sequence[Scored], wanted: Sequence[Scored]) -> float:
    """The largest over all tokens of completions before the first that was drawn or routed otherwise."""
    largest = 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        for mine, its in zip(*_shared(ours, theirs), strict=False):
            largest = max(largest, abs(mine - its)) if mine == mine else float("nan")
    return largest


def _shared(ours: Scored, theirs: Scored) -> tuple[Sequence[float], Sequence[float]]:
    """Log-probs of the tokens that both drew after the same way."""
    a, b = ours.completion, theirs.completion
    (_, _, seen), (_, _, other) = path_of(ours), path_of(theirs)
    if seen and seen[0] != other[0]:
        return (), ()
    count = 0
    for x, y in zip(a.token_ids, b.token_ids, strict=False):
        if x != y:
            break
        count += 1
        # The log-prob of the next token depends on where this one went.
        if seen and seen[1][count - 1] != other[1][count - 1]:
            break
    return a.logprobs[:count], b.logprobs[:count]
