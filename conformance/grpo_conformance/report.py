"""The verdict of a run of the suite as plain data, the JSON that a vendor publishes."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo_core.errors import ConfigError
from grpo_core.requirements import installed_version, required_name

from .case import BROKEN, LEVELS, Case, Outcome, Target
from .known import STALE
from .sign import digest
from .target import is_simulated, limits

SCHEMA = "grpo-conformance/1"
MUTANTS = "grpo-conformance-mutants/1"
"""Schema of the score that `grpo conformance --mutants` writes."""
PACKAGES = ("grpo-core", "torch", "numpy", "transformers")


def build(
    target: Target, results: Sequence[tuple[Case, Outcome]], *, levels: Sequence[int], quick: bool,
    known: Sequence[Mapping[str, Any]] = (), command: str = "", names: Sequence[str] = LEVELS,
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report of all outcomes, digest included; keys and their meaning are fixed by `SCHEMA`.

    The report of a model family has the key `model`, the target is then what it was computed on, and `names`
    are those of its levels.
    """
    subjects: dict[tuple[int, str], list[tuple[Case, Outcome]]] = {}
    for case, outcome in results:
        subjects.setdefault((case.level, case.subject), []).append((case, outcome))
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "quick": quick,
        **({} if model is None else {"model": dict(model)}),
        "target": _target(target),
        "environment": environment(target),
        "levels": [_level(level, names, results) for level in levels],
        "subjects": [_subject(level, name, rows) for (level, name), rows in sorted(subjects.items())],
        "cases": [_case(case, outcome) for case, outcome in results],
        "known": [dict(entry) for entry in known],
        "verdict": "fail"
        if any(entry.get("state") in STALE for entry in known)
        else verdict([outcome.status for _, outcome in results]),
    }
    return content | {"digest": digest(content)}


def verdict(statuses: Sequence[str]) -> str:
    """ "fail" where anything broke, "pass" where something passed, else "not_declared"."""
    if any(status in BROKEN for status in statuses):
        return "fail"
    return "pass" if any(status in ("pass", "known") for status in statuses) else "not_declared"


def environment(target: Target) -> dict[str, Any]:
    """Versions and machine, as far as they bear on the numbers; packages that offers require among them."""
    offers = [offer for row in target.offers.values() for offer in row]
    required = {required_name(text) or "" for offer in offers for text in offer.impl.requires}
    names = [*PACKAGES, *sorted(name for name in required - set(PACKAGES) if installed_version(name))]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: installed_version(name) or "" for name in names},
        "suite": metadata.version("grpo-core"),
    }


def read(path: Path, *schemas: str) -> dict[str, Any]:
    """A report from its file, of one of the schemas (`SCHEMA`). Raises `ConfigError` for what is none."""
    served = schemas or (SCHEMA,)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read",
            why=str(error),
            fix="give a file that `grpo conformance DEVICE --json FILE` wrote",
        ) from error
    if not isinstance(content, dict) or content.get("schema") not in served:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(
            f"{path} is not a conformance report",
            why=f"its schema is {found!r}, what is read here is {' or '.join(served)}",
            fix="write it again with this version of the suite",
        )
    return content


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    partial.replace(path)


def _target(target: Target) -> dict[str, Any]:
    info = target.probe.info
    plugins = {plugin.id: f"{plugin.distribution} {plugin.version}" for plugin in target.catalogue.plugins}
    return {
        "device": target.device.name,
        "type": info.type,
        "vendor": info.vendor,
        "name": info.name,
        "count": info.count,
        "memory_bytes": info.memory_bytes,
        "dtypes": sorted(info.dtypes),
        "features": sorted(info.features),
        "simulated": is_simulated(target),
        "limits": list(limits(target)),
        "plugins": plugins,
        "proofs": {
            f"{op} {offer.id}": offer.impl.proof
            for op, offers in sorted(target.offers.items())
            for offer in offers
            if offer.impl.proof
        },
    }


def _level(level: int, names: Sequence[str], results: Sequence[tuple[Case, Outcome]]) -> dict[str, Any]:
    rows = [outcome for case, outcome in results if case.level == level]
    return {
        "level": level,
        "name": names[level],
        "verdict": verdict([row.status for row in rows]),
        "counts": dict(sorted(Counter(row.status for row in rows).items())),
        "seconds": round(sum(row.seconds for row in rows), 2),
    }


def _subject(level: int, name: str, rows: Sequence[tuple[Case, Outcome]]) -> dict[str, Any]:
    broken = [(case, outcome) for case, outcome in rows if outcome.status in BROKEN]
    measured = [(case, outcome) for case, outcome in rows if _share(outcome) is not None]
    worst = max(measured, key=lambda row: _share(row[1]) or 0.0, default=None)
    if broken and (worst is None or (_share(worst[1]) or 0.0) <= 1.0):
        worst = broken[0]
    return {
        "level": level,
        "subject": name,
        "verdict": verdict([outcome.status for _, outcome in rows]),
        "counts": dict(sorted(Counter(outcome.status for _, outcome in rows).items())),
        "worst": None if worst is None else _case(*worst),
    }


def _share(outcome: Outcome) -> float | None:
    """How much of the tolerance an error takes; a NaN takes all and more."""
    if outcome.error is None or outcome.tolerance is None:
        return None
    if outcome.error != outcome.error or outcome.tolerance <= 0:
        return float("inf") if outcome.error != 0 else 0.0
    return outcome.error / outcome.tolerance


def _case(case: Case, outcome: Outcome) -> dict[str, Any]:
    row = {"id": case.id, "level": case.level, "subject": case.subject, **asdict(outcome)}
    return {key: value for key, value in row.items() if value not in (None, "", {})}
