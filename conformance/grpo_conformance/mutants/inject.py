"""Opens the simulated device with one fault, and runs a case on it."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_core.backend import import_pointer
from grpo_core.plugins import load

from ..case import Outcome, Target
from ..target import open_target
from .mutant import HEALTHY, NAME, Mutant, plugin_of
from .table import MUTANTS

PLUGINS = f"{__package__}.plugins"


def by_name(name: str) -> Mutant:
    """The row of a name. Raises KeyError."""
    return {mutant.name: mutant for mutant in MUTANTS}[name]


def open_mutated(mutant: Mutant) -> Target:
    """The simulated device with the faulty plugin installed beside its own. Switches are not touched."""
    if mutant.where == "switch":
        return open_target(HEALTHY)
    if mutant.where == "plugin":
        with installed(f"{PLUGINS}.{mutant.how}"):
            return open_target(HEALTHY, load())
    target = open_target(NAME if mutant.where == "device" else HEALTHY, load(extra={NAME: plugin_of(mutant)}))
    if not mutant.where.startswith("engine."):
        return target
    # An engine is taken by its name, and not by its rank.
    return replace(target, engines={mutant.where.removeprefix("engine."): f"{NAME}:plain"})


@contextmanager
def installed(module: str) -> Iterator[None]:
    """A distribution with an entry point for a module, on the path for a while."""
    with tempfile.TemporaryDirectory(prefix="grpo-mutant-") as folder:
        info = Path(folder) / f"{NAME}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[grpo.plugins]\n{NAME} = {module}\n", encoding="utf-8")
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            sys.path.remove(folder)


def under(target: Target, *, mutant: str, run: str, args: Mapping[str, Any]) -> Outcome:
    """A check of the suite on a mutant, in whose process this is; the given target is left alone."""
    outcome: Outcome = import_pointer(run)(_opened(mutant), **args)
    return outcome


@functools.cache
def _opened(name: str) -> Target:
    mutant = by_name(name)
    target = open_mutated(mutant)
    if mutant.where == "switch":
        target.device.open(0)
        from ..sim.runtime import ops

        mutant.how(ops)
    return target
