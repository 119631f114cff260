"""Rollout and trainer give the same log-probs for the same tokens and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.errors import PlanError
from grpo_core.loop import Clock, experience

from ..case import Outcome, Target, failed, passed
from .bands import Witness, batches_of, rollout_logprobs, trainer_logprobs, witness
from .runs import Lab, built, open_lab, undeclared


def agreement(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """Of a rollout's own tokens the trainer says what the rollout said, and both what the references say."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    try:
        planned = lab.plan(train__dtype=dtype, train__routing_replay="R3")
    except PlanError as error:
        return undeclared(error)
    with built(planned) as parts:
        parts.rollout.load_weights(parts.trainer.weights(), 1)
        scored = experience(parts, 0, Clock())
        batches = batches_of(parts, scored)
        ours, rollout = trainer_logprobs(parts, batches), rollout_logprobs(batches)
    seen = witness(lab, scored, dtype=dtype)
    return judge(
        seen, {"rollout and trainer": (rollout, ours), "trainer and reference": (ours, seen.logprobs)}
    )


def judge(seen: Witness, pairs: dict[str, tuple[Tensor, Tensor]]) -> Outcome:
    """The worst of some comparisons beside the band."""
    figures: dict[str, float] = {"tokens": float(len(seen.logprobs))}
    rows: list[tuple[float, float, float, str, dict[str, float]]] = []
    for name, (got, wanted) in pairs.items():
        gap = (got - wanted).abs()
        if not bool(torch.isfinite(gap).all()):
            return failed(f"{name}: log-probs that are not finite", figures=figures)
        mean, largest = float(gap.mean()), float(gap.max())
        figures |= {f"{name}, mean": mean, f"{name}, largest": largest}
        at = int(gap.argmax())
        rows.append((mean / seen.band.mean, mean, seen.band.mean, f"{name}, mean", {}))
        worst = {"token": at, "got": float(got[at]), "wanted": float(wanted[at])}
        rows.append((largest / seen.band.largest, largest, seen.band.largest, f"{name}, largest", worst))
    share, error, tolerance, name, worst = max(rows, key=lambda row: row[0])
    found = {"error": error, "tolerance": tolerance, "figures": figures, "worst": {"of": name, **worst}}
    if share > 1:
        return failed(f"{name}: |difference of log-probs| {error:.2e}, {tolerance:.2e} is allowed", **found)
    return passed(**found)


def consistent(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """With `consistent: true` there is no difference at all, whatever is packed or batched together."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    try:
        planned = lab.plan(
            train__dtype=dtype, consistent=True, rollout__max_sequences=5, train__micro_tokens=40
        )
    except PlanError as error:
        return undeclared(error)
    with built(planned) as parts:
        parts.rollout.load_weights(parts.trainer.weights(), 1)
        batches = batches_of(parts, experience(parts, 0, Clock()))
        gap = (trainer_logprobs(parts, batches) - rollout_logprobs(batches)).abs()
    found = {"error": float(gap.max()), "tolerance": 0.0, "figures": {"tokens": float(len(gap))}}
    differ = int((gap != 0).sum())
    return failed(f"{differ} of {len(gap)} log-probs differ", **found) if differ else passed(**found)
