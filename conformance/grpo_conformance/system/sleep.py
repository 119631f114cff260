"""Sleeping and waking around steps changes nothing but the memory in use."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from grpo_core import loop
from grpo_core.errors import PlanError
from grpo_core.loop import Clock, experience, learn
from grpo_core.model.checkpoint_io import read_tensors

from ..case import Outcome, Target, failed, passed
from .runs import Lab, Record, built, deterministic, open_lab, scratch, undeclared
from .trajectory import course, follow

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_core.loop import Parts

STEPS = 3
SHARE = 0.9
"""Of the bytes that sleep, which must be free at least: allocators round and keep scratch buffers."""


def sleep(target: Target, *, kind: str, dtype: str, keep: str, draw: int = 0) -> Outcome:
    """Steps with the trainer asleep in each rollout and the engine asleep in each update are those of a run
    in which nobody sleeps; the device's memory falls meanwhile."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    changes: dict[str, Any] = {"train__dtype": dtype, "train__steps": STEPS}
    changes["train__options"] = {"sleep": keep}
    try:
        planned = lab.plan(**changes, rollout__sleep=True)
    except PlanError as error:
        return undeclared(error)
    exact = deterministic(planned)
    with built(planned) as parts:
        slept, figures, trouble = shifts(parts, on_host=target.probe.info.type == "cpu")
        after = state(parts)
    if trouble:
        return failed(trouble, figures=figures)
    with built(lab.plan(**changes, rollout__sleep=False)) as parts:
        awake = steps(parts)
        before = state(parts)
    if exact:
        return bits(slept, awake, after, before, figures, of="the run that sleeps")
    outcome = follow(slept, awake, course(lab, dtype=dtype, steps=STEPS, full=False), dtype=dtype)
    return replace(outcome, figures={**outcome.figures, **figures})


def bits(
    slept: Record, awake: Record, after: dict[str, torch.Tensor], before: dict[str, torch.Tensor],
    figures: dict[str, float], *, of: str,
) -> Outcome:  # fmt: skip
    """Both runs must be the same; `of` names the first."""
    for step, (got, wanted) in enumerate(zip(slept.rows, awake.rows, strict=True), 1):
        differ = [name for name in wanted if got[name] != wanted[name]]
        if differ:
            name = differ[0]
            return failed(
                f"{of} has {name} {got[name]!r} {step} steps after its start, the other {wanted[name]!r}",
                figures=figures, error=abs(got[name] - wanted[name]), tolerance=0.0,
                worst={"step": step, "metric": name},
            )  # fmt: skip
    wrong = [name for name, x in before.items() if not torch.equal(x, after[name])]
    if wrong:
        return failed(f"{len(wrong)} tensors of the two trainers differ, {wrong[0]} first", figures=figures)
    return passed(error=0.0, tolerance=0.0, figures=figures)


def steps(parts: Parts) -> Record:
    """The loop's steps."""
    record = Record()
    loop.train(parts, record, first_step=0)
    return record


def shifts(parts: Parts, *, on_host: bool) -> tuple[Record, dict[str, float], str]:
    """The same steps with one side asleep at any time; bytes on the device, and what is wrong with them."""
    record = Record()

    def allocated() -> int:
        return int(parts.memory.stats().allocated)

    figures: dict[str, float] = {}
    weights = sum(tensor.nbytes for _, tensor in parts.trainer.weights())
    # Weights, and two moments in float32.
    held = weights + sum(8 * tensor.numel() for _, tensor in parts.trainer.weights())
    parts.rollout.load_weights(parts.trainer.weights(), 0)
    for step in range(STEPS):
        clock = Clock()
        before, kept = allocated(), state(parts) if step == 0 else {}
        parts.trainer.sleep()
        freed = before - allocated()
        full = allocated()
        scored = experience(parts, step, clock)
        rested = full - allocated()
        parts.trainer.wake()
        if step == 0:
            figures = {"weights": float(weights), "freed by the trainer": float(freed),
                       "freed by the engine": float(rested)}  # fmt: skip
            lost = [name for name, x in state(parts).items() if not torch.equal(x, kept[name])]
            if lost:
                return record, figures, f"{len(lost)} tensors wake with another content, {lost[0]} first"
            # On a host no account covers all of its memory.
            if not on_host and freed < SHARE * held:
                return record, figures, f"the trainer's sleep frees {freed} bytes of at least {held}"
            if not on_host and rested < SHARE * weights:
                return record, figures, f"the engine's sleep frees {rested} bytes of weights of {weights}"
        metrics = learn(parts, step, scored, clock)
        parts.rollout.load_weights(parts.trainer.weights(), step + 1)
        clock.seconds["step"] = 0.0
        record.on_step(step + 1, loop.report(parts, scored, metrics, clock), scored)
    return record, figures, ""


def state(parts: Parts) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint of the trainer holds, by file and name."""
    return tensors_of(_saved(parts))


def _saved(parts: Parts) -> Path:
    folder = scratch("state")
    parts.trainer.save(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder: weights by name, those of other files behind the file's name."""
    from safetensors.torch import load_file

    found = dict(read_tensors(folder))
    for path in sorted(folder.glob("*.safetensors")):
        if not path.name.startswith("model"):
            found |= {f"{path.stem}: {name}": tensor for name, tensor in load_file(path).items()}
    return found
