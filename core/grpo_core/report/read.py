"""What a run folder tells, as far as it was written; a run that still goes on can be read too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..yaml_source import parse_yaml

Points = list[tuple[float, float | None]]
"""(step, value); None where a value was not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """One run."""

    label: str
    folder: Path
    rows: Sequence[Mapping[str, Any]]
    """metrics.jsonl, by step."""
    samples: Sequence[Mapping[str, Any]]
    config: Mapping[str, Any]
    config_text: str
    plan: Mapping[str, Any]
    environment: Mapping[str, Any]

    def points(self, name: str) -> Points:
        """The curve of a metric; empty when it was never written."""
        found: dict[float, float | None] = {}
        for row in self.rows:
            if name in row:
                value = row[name]
                found[row["step"]] = float(value) if isinstance(value, int | float) else None
        return sorted(found.items())

    def names(self) -> list[str]:
        """All metrics that occur, in the order in which they came up."""
        return list(dict.fromkeys(name for row in self.rows for name in row if name != "step"))

    def row(self, step: float) -> Mapping[str, Any]:
        """All metrics of a step; of rows of the same step, each later one adds to it."""
        return {name: row[name] for row in self.rows if row["step"] == step for name in row if name != "step"}

    def completions(self, step: float) -> list[tuple[str, str]]:
        """(prompt, completion) of a step, as far as they were kept."""
        rows = [row for row in self.samples if row["step"] == step]
        return [(str(row.get("prompt", "")), str(row.get("completion", ""))) for row in rows]


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs, each with a label of its own. Raises `ConfigError` for a folder without metrics."""
    names = [folder.resolve().name for folder in folders]
    labels = [
        name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, start=1)
    ]
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> RunData:
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(
            f"{folder} has no metrics to report",
            why=f"there is no {metrics.name} in it",
            fix="name the folder that `grpo train` printed when it started",
        )
    config_text = _text(folder / "config.yaml")
    config = parse_yaml(config_text, str(folder / "config.yaml")).data
    return RunData(
        label=label,
        folder=folder,
        rows=_rows(metrics),
        samples=_rows(folder / "samples.jsonl"),
        config=config if isinstance(config, dict) else {},
        config_text=config_text,
        plan=_object(folder / "plan.json"),
        environment=_object(folder / "environment.json"),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    found = _json(_text(path))
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    # A run that still goes on may be in the middle of its last line.
    found = [_json(line) for line in _text(path).split("\n") if line.strip()]
    rows = [row for row in found if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return sorted(rows, key=lambda row: int(row["step"]))


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
