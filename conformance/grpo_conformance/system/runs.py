"""Runs as `grpo train` does them, with what happens on the way kept."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_core import loop
from grpo_core.config_loader import parse_config
from grpo_core.errors import PlanError
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import NONE, Plan
from grpo_core.planning import PlannedRun, plan_run
from grpo_core.session import build_parts

from ..case import Outcome
from .models import KINDS, served, write_model
from .task import settings, text_of, write_data

if TYPE_CHECKING:
    from torch import Tensor

    from grpo_core.loop import Parts
    from grpo_core.types import Scored

    from ..case import Target

UNSTEADY = ("time/", "throughput/", "memory/")
"""Beginnings of metrics that no two runs share."""
FOREIGN = re.compile(r": for \w+, not \w+$")
SEED, STRIDE = 20, 100
"""Of a model's weights, and from one draw to the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """A kind of model with its files, on a target; equal to any other with the same files."""

    target: Target = field(compare=False)
    model: Path
    other: Path
    """The same with other weights."""
    data: Path
    seed: int = 0
    """`run.seed` of every run."""

    def plan(
        self, *, cpu: bool = False, earlier: Plan | None = None, model: Path | None = None, **changes: Any
    ) -> PlannedRun:
        """Plan a run on the target, or with `cpu` on the references of the CPU.

        Raises `PlanError` where nothing serves an op.
        """
        device = "cpu" if cpu else self.target.device.name
        if cpu:
            changes["ops"] = REFERENCES
        else:
            changes |= {f"{role}__engine": engine for role, engine in self.target.engines.items()}
        changes.setdefault("run__seed", self.seed)
        tree = settings(model or self.model, self.data, device, **changes)
        loaded = parse_config(text_of(tree), "conformance.yaml")
        return plan_run(loaded, earlier=earlier, catalogue=self.target.catalogue)


REFERENCES: Mapping[str, str] = {
    op: NONE if contract.reference is None else "core:reference"
    for op, contract in CONTRACTS.items()
    if not op.startswith("engine.")
}
"""Pins of every op to core's own."""


@dataclass(slots=True)
class Record:
    """The loop's `Observer`, which keeps metrics, completions and log-probs of each step."""

    rows: list[dict[str, float]] = field(default_factory=list)
    scored: list[list[Scored]] = field(default_factory=list)

    def on_step(self, step: int, metrics: Mapping[str, float], scored: Sequence[Scored]) -> None:
        """A finished step."""
        self.rows.append({k: v for k, v in metrics.items() if not k.startswith(UNSTEADY)})
        self.scored.append(list(scored))

    def save(self, step: int) -> None:
        """Nothing is written."""

    def paths(self, step: int) -> list[tuple[Any, ...]]:
        """What was drawn and which experts were asked, for each completion of a step."""
        return [path_of(item) for item in self.scored[step]]


def path_of(item: Scored) -> tuple[Any, ...]:
    """Prompt, tokens and the experts of each: what a rounding changes all at once or not at all."""
    completion, experts = item.completion, item.completion.routed_experts
    seen = () if experts is None else (sets(experts.prompt_PMk), sets(experts.completion_NMk))
    return completion.prompt_id, completion.token_ids, seen


def sets(ids_NMk: Tensor) -> list[Any]:
    """Experts of each token and layer, whatever their order."""
    found: list[Any] = ids_NMk.sort(-1).values.tolist()
    return found


@cache
def _folder() -> Path:
    """Of this process; goes with it."""
    path = Path(tempfile.mkdtemp(prefix="grpo-system-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def scratch(name: str) -> Path:
    """A new folder."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_folder()))


def open_lab(target: Target, kind: str, draw: int = 0) -> Lab | str:
    """The files of a kind of model, made once a process, or why no installed family serves it. Another `draw`
    has other weights, prompts in another order and other random numbers in its runs.

    Opens the device first: torch takes a foreign device type before the first backward of a process only.
    """
    found = served(KINDS[kind], target.catalogue)
    if isinstance(found, str):
        return found
    family, config = found
    target.device.open(0)
    root = _folder() / f"{kind}-{draw}"
    if not root.exists():
        root.mkdir()
        for seed, name in enumerate(("model", "other")):
            (root / name).mkdir()
            write_model(root / name, family, config, seed=SEED + 7 * seed + STRIDE * draw)
        write_data(root / "data.jsonl")
    return Lab(target=target, model=root / "model", other=root / "other", data=root / "data.jsonl", seed=draw)


@contextmanager
def built(planned: PlannedRun, *, resume_from: Path | None = None) -> Iterator[Parts]:
    """The parts of a run, closed at the end."""
    parts = build_parts(planned, resume_from=resume_from)
    try:
        yield parts
    finally:
        parts.rewards.close()
        parts.rollout.close()
        parts.trainer.close()


def run(planned: PlannedRun) -> Record:
    """All steps of a planned run."""
    record = Record()
    with built(planned) as parts:
        loop.train(parts, record, first_step=0)
    return record


def deterministic(planned: PlannedRun) -> bool:
    """Whether equal runs must give equal bits: every chosen offer declares it, or all runs in one thread of
    the host, where nothing can come in another order. Engines are core's."""
    if planned.info.type == "cpu":
        return True
    impls = {(op, offer.id): offer.impl for op, rows in planned.catalogue.offers.items() for offer in rows}
    return all(
        impls[row.op, row.chosen].deterministic
        for row in planned.plan.choices
        if row.chosen and not row.covered_by and not row.op.startswith("engine.")
    )


def undeclared(why: str | PlanError) -> Outcome:
    """The outcome for what the device or the installed families do not serve."""
    if isinstance(why, PlanError):
        # Offers for other devices are no reason of this one's.
        reasons = [reason for reason in why.why.split("; ") if not FOREIGN.search(reason)]
        why = f"{why.what}: {'; '.join(reasons)}"
    return Outcome(status="not_declared", message=why)
