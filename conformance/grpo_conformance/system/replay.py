"""Routing replay: the update uses the experts that it is told to, and the routers still learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_core.errors import PlanError
from grpo_core.loop import Clock, experience
from grpo_core.model.arch import MoE
from grpo_core.train.routing import CHANGED, FREE_CHANGED

from ..case import Outcome, Target, failed, passed
from .bands import MULTIPLE, ROUNDING, batches_of, jolted, trainer_logprobs
from .models import ROUTER
from .runs import Lab, built, open_lab, undeclared

if TYPE_CHECKING:
    from grpo_core.loop import Parts
    from grpo_core.planning import PlannedRun
    from grpo_core.types import Batch, Scored

FAR = 1e-2
"""Learning rate after which many tokens would choose other experts."""


def replay(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """R3: no token uses another expert than the rollout did, and every router moves."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    try:
        planned = lab.plan(train__dtype=dtype, train__routing_replay="R3", train__lr=FAR)
    except PlanError as error:
        return undeclared(error)
    with built(planned) as parts:
        parts.rollout.load_weights(parts.trainer.weights(), 1)
        scored = experience(parts, 0, Clock())
        batches = batches_of(parts, scored)
        if any(batch.routed_experts_TMk is None for batch in batches):
            return failed("the rollout engine records no experts")
        before = routers(parts, planned)
        first = parts.trainer.step(batches, parts.loss).values
        moved = {name: float((x - before[name]).norm()) for name, x in routers(parts, planned).items()}
        # The same completions again, with weights that would send many tokens elsewhere.
        second = parts.trainer.step(batches, parts.loss).values
    figures = {
        "changed": first[CHANGED], "changed without replay": first[FREE_CHANGED],
        "changed after an update": second[CHANGED],
        "changed after an update without replay": second[FREE_CHANGED],
        "least move of a router": min(moved.values()),
    }  # fmt: skip
    worst = max(first[CHANGED], second[CHANGED])
    found = {"error": worst, "tolerance": 0.0, "figures": figures}
    if worst > 0:
        return failed(f"{worst:.1%} of the experts are not those of the rollout", **found)
    if not second[FREE_CHANGED] > 0:
        return failed("nothing would have changed without replay, so that this shows nothing", **found)
    still = [name for name, by in moved.items() if not by > 0]
    return failed(f"no gradient reaches {', '.join(still)}", **found) if still else passed(**found)


def forced(target: Target, *, kind: str, draw: int = 0) -> Outcome:
    """Given experts that no router chose, log-probs and gradients are those of the references with them."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    changes: dict[str, Any] = {"train__dtype": "float32", "train__routing_replay": "R3"}
    try:
        planned = lab.plan(**changes)
    except PlanError as error:
        return undeclared(error)
    experts = max(layer.ffn.num_experts for layer in planned.arch.layers if isinstance(layer.ffn, MoE))
    with built(planned) as parts:
        parts.rollout.load_weights(parts.trainer.weights(), 1)
        scored = experience(parts, 0, Clock())
        free = trainer_logprobs(parts, batches_of(parts, scored))
        ours, norm = update(parts, scored, experts)
    found = []
    for model in (lab.model, jolted(lab.model, "float32")):
        with built(lab.plan(cpu=True, model=model, **changes)) as parts:
            found.append(update(parts, scored, experts))
    (wanted, norm_wanted), (twin, norm_twin) = found
    moved = float((wanted - twin).abs().max())
    allowed = MULTIPLE["float32"] * moved + 2 * ROUNDING["float32"] * float(wanted.abs().max())
    gap = float((ours - wanted).abs().max())
    # The twin's norm may be equal by chance; a backward pass of this depth errs by some hundred roundings.
    norms = 16 * abs(norm_twin - norm_wanted) + 1000 * ROUNDING["float32"] * norm_wanted
    figures = {
        "moved by other experts": float((free - ours).abs().max()), "grad_norm": norm,
        "grad_norm of the reference": norm_wanted, "allowed of grad_norm": norms,
    }  # fmt: skip
    outcome = {"error": gap, "tolerance": allowed, "figures": figures}
    if not gap <= allowed:
        return failed(f"log-probs with given experts differ by {gap:.2e} from the references'", **outcome)
    if not abs(norm - norm_wanted) <= norms:
        return failed(f"the gradient's norm is {norm}, that of the references {norm_wanted}", **outcome)
    if not figures["moved by other experts"] > 4 * allowed:
        return failed("other experts change nothing, so that this shows nothing", **outcome)
    return passed(**outcome)


def update(parts: Parts, scored: Sequence[Scored], experts: int) -> tuple[Tensor, float]:
    """Log-probs with each expert replaced by its neighbour, and the norm of an update's gradient."""
    batches = [neighbours(batch, experts) for batch in batches_of(parts, scored)]
    logprobs = trainer_logprobs(parts, batches)
    return logprobs, float(parts.trainer.step(batches, parts.loss).values["grad_norm"])


def neighbours(batch: Batch, experts: int) -> Batch:
    """The batch as if the rollout had used the expert after each that it used; unknown ones stay so."""
    ids_TMk = batch.routed_experts_TMk
    assert ids_TMk is not None
    return replace(batch, routed_experts_TMk=torch.where(ids_TMk < 0, ids_TMk, (ids_TMk + 1) % experts))


def routers(parts: Parts, planned: PlannedRun) -> dict[str, Tensor]:
    """Copies of the routers' weights by checkpoint name."""
    rules = planned.family.weights(planned.arch).rules
    names = {part.name for rule in rules if rule.neutral.endswith(ROUTER) for part in rule.parts}
    found = {name: x.detach().float().cpu().clone() for name, x in parts.trainer.weights() if name in names}
    assert found.keys() == names and names
    return found


def old_pass(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """R2: a second update on the same completions uses the experts of the pass before the first."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    try:
        planned = lab.plan(train__dtype=dtype, train__routing_replay="R2", train__lr=FAR, algo__epochs=2)
    except PlanError as error:
        return undeclared(error)
    with built(planned) as parts:
        parts.rollout.load_weights(parts.trainer.weights(), 1)
        scored = experience(parts, 0, Clock())
        batches = parts.trainer.with_old(batches_of(parts, scored))
        first, second = (parts.trainer.step(batches, parts.loss).values for _ in range(2))
    figures = {
        "changed": first[CHANGED], "changed after an update": second[CHANGED],
        "changed after an update without replay": second[FREE_CHANGED],
    }  # fmt: skip
    off = max(abs(second[CHANGED] - first[CHANGED]), abs(first[FREE_CHANGED] - first[CHANGED]))
    found = {"error": off, "tolerance": 0.0, "figures": figures}
    if off > 0:
        return failed("the experts of an update are not those of the pass before the first", **found)
    if not second[FREE_CHANGED] > first[CHANGED]:
        return failed("nothing would have changed without replay, so that this shows nothing", **found)
    return passed(**found)
