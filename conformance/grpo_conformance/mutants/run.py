"""Sets the suite on every mutant, and on the healthy device with many draws of values."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo_core.ops.contract import CONTRACTS

from ..case import BROKEN, LEVELS, Case, Outcome, Target, check_of
from ..collect import collect, pick_levels
from ..target import open_target
from ..worker import Worker
from .inject import open_mutated
from .mutant import HEALTHY, NAME, Mutant

HEALTHY_LEVELS = ("device", "ops", "memory", "collectives", "system")
"""Levels whose values can be drawn anew."""
ROOM = "mutants"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one mutant."""

    name: str
    level: str
    """That must catch it."""
    where: str
    caught_by: str
    """That did; empty for none."""
    case: str
    """The case that failed under it and passes without it."""
    status: str
    message: str
    cases: int
    """Cases that were run until then."""
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether the right level noticed."""
        return self.caught_by == self.level


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A case that fails on the healthy device."""

    case: str
    draw: int
    status: str
    message: str


class Healthy:
    """The device without faults, asked at most once about each case."""

    def __init__(self) -> None:
        self.worker = Worker(HEALTHY)
        self.known: dict[str, Outcome] = {}

    def passes(self, case: Case) -> bool:
        """Whether the case passes, or is about what this device does not declare."""
        if case.id not in self.known:
            self.known[case.id] = self.worker.run(replace(case, room=ROOM, alone=False))
        return self.known[case.id].status not in BROKEN


def hunt(mutants: Iterable[Mutant], tell: Callable[[Row], None] = lambda row: None) -> list[Row]:
    """Every mutant until the first case that notices it."""
    healthy, worker = Healthy(), Worker(HEALTHY)
    rows = []
    try:
        for mutant in mutants:
            rows.append(_hunt_one(mutant, worker, healthy))
            tell(rows[-1])
    finally:
        worker.close()
        healthy.worker.close()
    return rows


def _hunt_one(mutant: Mutant, worker: Worker, healthy: Healthy) -> Row:
    began, count, spurious = time.monotonic(), 0, ""
    for case in cases_for(mutant, open_mutated(mutant)):
        outcome = worker.run(_under(mutant, case))
        count += 1
        if outcome.status not in BROKEN:
            continue
        if not healthy.passes(as_healthy(case)):
            spurious = f"{case.id} fails on the healthy device too"
            continue
        return Row(
            name=mutant.name, level=mutant.level, where=mutant.where, caught_by=LEVELS[case.level],
            case=case.id, status=outcome.status, message=outcome.message, cases=count,
            seconds=round(time.monotonic() - began, 3),
        )  # fmt: skip
    return Row(
        name=mutant.name, level=mutant.level, where=mutant.where, caught_by="", case="", status="missed",
        message=spurious or "no case noticed", cases=count, seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip


def cases_for(mutant: Mutant, target: Target) -> list[Case]:
    """Cases of the mutant's level about what it spoils: the likely ones, those of a quick run, the rest."""
    level = [LEVELS.index(mutant.level)]
    quick = {case.id for case in collect(target, levels=level, quick=True)}
    about = [case for case in collect(target, levels=level, quick=False) if _is_about(mutant, case)]
    return sorted(about, key=lambda case: (mutant.ask not in case.id, case.id not in quick))


def _is_about(mutant: Mutant, case: Case) -> bool:
    offer, plugin = case.args.get("offer_id"), case.args.get("plugin")
    if offer is not None:
        same = case.args.get("op", mutant.where) == mutant.where or mutant.where in ("plugin", "switch")
        return same and str(offer).startswith(f"{mutant.owner}:")
    # What answers for an op here is no module that could be imported.
    return plugin is None or (plugin == mutant.owner and mutant.where not in CONTRACTS)


def _under(mutant: Mutant, case: Case) -> Case:
    return replace(
        case,
        run="grpo_conformance.mutants.inject:under",
        args={"mutant": mutant.name, "run": case.run, "args": dict(case.args)},
        room=mutant.name if mutant.lasting else ROOM,
        alone=False,
        timeout=mutant.timeout or case.timeout,
    )


def as_healthy(case: Case) -> Case:
    """The same question to the offer or plugin that the mutant was made from."""
    args: dict[str, Any] = _renamed(dict(case.args))
    return replace(case, id=_renamed(case.id), subject=_renamed(case.subject), args=args)


def _renamed(value: Any) -> Any:
    if isinstance(value, str):
        word = HEALTHY if value == NAME else value
        return word.replace(f"{NAME}:", f"{HEALTHY}:").replace(f"plugin/{NAME}/", f"plugin/{HEALTHY}/")
    if isinstance(value, dict):
        return {name: _renamed(one) for name, one in value.items()}
    return [_renamed(one) for one in value] if isinstance(value, list | tuple) else value


def false_alarms(
    draws: Sequence[int], *, levels: Sequence[str] = HEALTHY_LEVELS, quick: bool = True
) -> tuple[list[Alarm], int]:
    """Cases of the healthy device's own offers that fail under any draw, and how many cases were asked."""
    target, worker = open_target(HEALTHY), Worker(HEALTHY)
    asked = pick_levels(levels)
    cases = [case for case in collect(target, levels=asked, quick=quick) if _own(case)]
    alarms, count = [], 0
    try:
        for number, draw in enumerate(draws):
            for case in cases if not number else [case for case in cases if _again(case)]:
                outcome = worker.run(_drawn(case, draw))
                count += 1
                if outcome.status in BROKEN:
                    alarms.append(
                        Alarm(case=case.id, draw=draw, status=outcome.status, message=outcome.message)
                    )
    finally:
        worker.close()
    return alarms, count


def _own(case: Case) -> bool:
    return str(case.args.get("offer_id", f"{HEALTHY}:")).startswith(f"{HEALTHY}:")


def _again(case: Case) -> bool:
    """Whether to ask with each draw: processes that wait for a lost peer take long, and no values."""
    return LEVELS[case.level] != "collectives" or "seed" in case.args


def _drawn(case: Case, draw: int) -> Case:
    """With other values, where the check has any."""
    known = inspect.signature(check_of(case)).parameters
    args = {**case.args, **{name: draw for name in ("draw", "seed") if name in known}}
    return replace(case, args=args, room=ROOM, alone=False)
