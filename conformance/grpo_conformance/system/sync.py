"""The policy's weights on their way to the rollout engine and back again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_core.errors import PlanError
from grpo_core.loop import Clock, experience, learn
from grpo_core.model.checkpoint_io import copy_side_files, read_tensors
from grpo_core.types import Prompt, Sampling

from ..case import Outcome, Target, failed, passed
from .bands import ROUNDING
from .runs import Lab, built, deterministic, open_lab, scratch, undeclared

if TYPE_CHECKING:
    from grpo_core.loop import Parts
    from grpo_core.types import Completion

TOKENS = 8


def sync(target: Target, *, kind: str, dtype: str, draw: int = 0) -> Outcome:
    """Every tensor arrives, every time: what an engine says after a sync is what an engine says that never
    held other weights, bit for bit where the plan's offers are deterministic."""
    lab = open_lab(target, kind, draw)
    if not isinstance(lab, Lab):
        return undeclared(lab)
    changes: dict[str, Any] = {"train__dtype": dtype, "rollout__sleep": False}
    try:
        here = lab.plan(**changes)
        there = lab.plan(**changes, model=lab.other)
    except PlanError as error:
        return undeclared(error)
    with built(here) as a, built(there) as b:
        trouble = exported(a, lab.model)
        if trouble:
            return failed(trouble)
        a.rollout.load_weights(a.trainer.weights(), 1)
        scored = experience(a, 0, Clock())
        first, disk = told(a), told(b)
        # Where runs differ by themselves, by how much they do, and the last bits of what is compared.
        band = 0.0 if deterministic(here) else 4 * apart(told(a), first) + 8 * ROUNDING[dtype]
        a.rollout.load_weights(b.trainer.weights(), 2)
        visit, version = told(a), a.rollout.describe()["weight_version"]
        a.rollout.load_weights(a.trainer.weights(), 3)
        back = told(a)
        learn(a, 0, scored, Clock())
        a.rollout.load_weights(a.trainer.weights(), 4)
        learned = told(a)
        trouble = exported(a, saved(a))
        if trouble:
            return failed(f"after an update: {trouble}")
        with built(lab.plan(**changes, model=saved(a))) as fresh:
            wanted = told(fresh)
    pairs = {
        "other weights from a trainer against the same from the disk": (visit, disk),
        "the first weights again": (back, first),
        "updated weights against their checkpoint": (learned, wanted),
    }
    return judge(pairs, band, changed=(first, visit, learned), version=(version, visit, learned))


def judge(
    pairs: dict[str, tuple[list[Completion], list[Completion]]],
    band: float,
    *,
    changed: tuple[list[Completion], list[Completion], list[Completion]],
    version: tuple[int, list[Completion], list[Completion]],
) -> Outcome:
    """Greedy tokens and log-probs of pairs beside the band; versions and changes as they must be."""
    worst, at = 0.0, ""
    for name, (got, wanted) in pairs.items():
        error = apart(got, wanted)
        if not error <= worst:
            worst, at = error, name
    first, visit, learned = changed
    figures = {"moved by other weights": apart(visit, first), "moved by an update": apart(learned, first)}
    found = {"error": worst, "tolerance": band, "figures": figures, "worst": {"of": at} if at else {}}
    if not worst <= band:
        return failed(f"{at}: log-probs of greedy tokens differ by {worst:.2e}", **found)
    said, after, later = version
    if said != 2 or any(c.weight_version != 2 for c in after) or any(c.weight_version != 4 for c in later):
        return failed("completions do not carry the version of the weights that made them", **found)
    if min(figures.values()) <= 4 * band:
        return failed("new weights change nothing of what the engine says", **found)
    if [c.token_ids for c in visit] == [c.token_ids for c in first]:
        return failed("with other weights the greedy tokens are the same", **found)
    return passed(**found)


def told(parts: Parts) -> list[Completion]:
    """Greedy completions of all prompts."""
    prompts = [Prompt(id=i, token_ids=q.token_ids, seeds=(i,)) for i, q in enumerate(parts.questions)]
    found = parts.rollout.generate(prompts, Sampling(max_tokens=TOKENS, temperature=0.0, min_tokens=TOKENS))
    return sorted(found, key=lambda completion: completion.prompt_id)


def apart(got: list[Completion], wanted: list[Completion]) -> float:
    """The largest difference of log-probs (at temperature 1) up to where tokens part; a parting counts what
    the engine preferred its own token by, at least."""
    largest = 0.0
    for ours, theirs in zip(got, wanted, strict=True):
        pairs = zip(ours.token_ids, theirs.token_ids, ours.logprobs_t1, theirs.logprobs_t1, strict=False)
        for token, other, mine, its in pairs:
            largest = max(largest, abs(mine - its))
            if token != other:
                # Greedy tokens of equal log-probs part by a last bit.
                largest = max(largest, 2.0**-24)
                break
    return largest


def exported(parts: Parts, folder: Path) -> str:
    """What of the trainer's weights is not what a folder holds; nothing when all is."""
    weights = {name: tensor.detach().cpu() for name, tensor in parts.trainer.weights()}
    source: dict[str, Tensor] = dict(read_tensors(folder))
    if weights.keys() != source.keys():
        return f"names differ from the checkpoint's: {sorted(weights.keys() ^ source.keys())[:4]}"
    wrong = [name for name, x in weights.items() if not torch.equal(x, source[name].to(x.dtype))]
    return f"{len(wrong)} tensors differ from the checkpoint's, {wrong[0]} first" if wrong else ""


def saved(parts: Parts) -> Path:
    """A model folder with the trainer's weights as they are now."""
    folder = scratch("saved")
    parts.trainer.save(folder)
    copy_side_files(Path(parts.config.model), folder)
    return folder
