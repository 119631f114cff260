"""Every case that a target's declarations ask for."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from grpo_core.errors import ConfigError
from grpo_core.plugin_checks import did_you_mean

from .case import LEVELS, Case, Target


def pick_levels(names: Sequence[str]) -> tuple[int, ...]:
    """Level numbers from names, numbers and ranges ("ops", "2", "0-3"); all that there are for nothing.

    Raises `ConfigError` for a level that does not exist, or not yet.
    """
    built = tuple(level for level in range(len(LEVELS)) if _module_exists(level))
    chosen: set[int] = set()
    for name in names:
        first, _, last = name.partition("-")
        if name in LEVELS:
            chosen.add(LEVELS.index(name))
        elif first.isdigit() and (last or first).isdigit() and int(last or first) < len(LEVELS):
            chosen.update(range(int(first), int(last or first) + 1))
        else:
            raise ConfigError(
                f"there is no level {name!r}{did_you_mean(name, LEVELS)}",
                why="levels: " + ", ".join(f"{i} {known}" for i, known in enumerate(LEVELS)),
                fix="give names, numbers or a range such as 0-3",
            )
    absent = sorted(chosen - set(built))
    if absent:
        raise ConfigError(
            f"level {absent[0]} ({LEVELS[absent[0]]}) is not in this release",
            why=f"it has the levels {', '.join(f'{level} {LEVELS[level]}' for level in built)}",
            fix="ask for those, or leave --level out",
        )
    return tuple(sorted(chosen)) or built


def _module_exists(level: int) -> bool:
    return importlib.util.find_spec(f"{__package__}.levels.{LEVELS[level]}") is not None


def collect(target: Target, *, levels: Sequence[int], quick: bool) -> list[Case]:
    """Cases of the levels, in order. Raises ValueError for an id that two cases share."""
    cases: list[Case] = []
    for level in levels:
        module = importlib.import_module(f"{__package__}.levels.{LEVELS[level]}")
        cases += module.cases(target, quick=quick)
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise ValueError(f"two cases are called {case.id}")
        seen.add(case.id)
    return cases
