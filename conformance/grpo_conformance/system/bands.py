"""How far two right computations may be apart: measured, not tuned.

The measure is what a tiny change of the weights does to the references on the CPU. Each weight is multiplied
by 1 +- one rounding of the dtype, at random; each op then errs by about one rounding of its own, and what
comes out of the model moves by as much as its conditioning makes of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_core.algo.packing import pack

from .models import jolt
from .runs import Lab, built, scratch

if TYPE_CHECKING:
    from grpo_core.loop import Parts
    from grpo_core.types import Batch, Scored

ROUNDING: Mapping[str, float] = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
"""The largest relative error of rounding to nearest."""
MULTIPLE: Mapping[str, float] = {"float32": 4.0, "bfloat16": 2.0}
"""Both sides of a comparison err (2); in float32 the sums within an op do so, too, and not its result alone
(2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What two right computations of the same log-probs may differ by, in nats."""

    mean: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """What the references say of given completions."""

    logprobs: Tensor
    """float32, in the order of completions and tokens."""
    band: Band


@cache
def jolted(model: Path, dtype: str) -> Path:
    """The model with its weights changed by a rounding of a dtype; made once a process."""
    return jolt(model, scratch("jolted"), ROUNDING[dtype])


def batches_of(parts: Parts, scored: Sequence[Scored]) -> list[Batch]:
    """Completions as the loop packs them."""
    train = parts.config.train
    return pack(scored, micro_tokens=train.micro_tokens, share_prompt=train.share_prompt, device=parts.device)


def trainer_logprobs(parts: Parts, batches: Sequence[Batch]) -> Tensor:
    """float32 on the host; the policy's log-probs of all tokens."""
    found = parts.trainer.logprobs(batches, reference=False)
    return torch.cat([part.detach().float().cpu() for part in found])


def rollout_logprobs(batches: Sequence[Batch]) -> Tensor:
    """float32 on the host; what the rollout engine said of the same tokens."""
    return torch.cat([batch.rollout_logprobs_L.float().cpu() for batch in batches])


def witness(lab: Lab, scored: Sequence[Scored], *, dtype: str, model: Path | None = None) -> Witness:
    """The references' log-probs of completions, and how far a rounding of the weights moves them.

    A mixture replays the experts that the completions recorded: which experts near ties go to is a question
    of its own.
    """
    model = model or lab.model
    found = []
    for source in (model, jolted(model, dtype)):
        planned = lab.plan(cpu=True, model=source, train__dtype=dtype, train__routing_replay="R3")
        with built(planned) as parts:
            found.append(trainer_logprobs(parts, batches_of(parts, scored)))
    moved = (found[0] - found[1]).abs()
    # The log-probs themselves are rounded to float32.
    floor = 2 * ROUNDING["float32"] * max(1.0, float(found[0].abs().max()))
    return Witness(
        logprobs=found[0],
        band=Band(
            mean=MULTIPLE[dtype] * float(moved.mean()) + floor,
            largest=MULTIPLE[dtype] * float(moved.max()) + floor,
        ),
    )
