"""The folder of a run: what it was asked, what served it, and what it wrote."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .checkpoint import checkpoints
from .errors import ConfigError

CONFIG, PLAN, METRICS, SAMPLES = "config.yaml", "plan.json", "metrics.jsonl", "samples.jsonl"
ENVIRONMENT = "environment.json"


def choose_run_dir(pattern: str, name: str) -> Path:
    """The folder of a new run; `{name}` and `{time}` in the pattern are filled in.

    Raises `ConfigError` when it exists already: a run never writes into another's folder.
    """
    try:
        text = pattern.format(name=name, time=time.strftime("%Y%m%d-%H%M%S"))
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"run.dir {pattern!r} cannot be filled in",
            why=f"it names {error}; known are {{name}} and {{time}}",
            fix="use run.dir=runs/{name}-{time}, or a plain path",
        ) from error
    path = Path(text).expanduser()
    if path.exists():
        raise ConfigError(
            f"run folder {path} exists",
            why="a run never writes into the folder of another",
            fix=f"give another with run.dir=..., or continue it with `grpo train --resume {path}`",
        )
    return path


def make_run_dir(path: Path) -> None:
    """Make the folder. Raises `ConfigError` when that is not possible."""
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"run folder {path} cannot be made",
            why=str(error.strerror or error),
            fix="give a folder that you may write to with run.dir=...",
        ) from error


def open_run_dir(path: Path) -> Path:
    """The folder of an earlier run. Raises `ConfigError` when it is not one."""
    if not (path / CONFIG).is_file():
        raise ConfigError(
            f"{path} is not a run folder",
            why=f"it has no {CONFIG}",
            fix="name the folder that `grpo train` printed when it started",
        )
    return path


def drop_after(run_dir: Path, step: int) -> None:
    """Forget what was written after `step`: later rows of the logs and later checkpoints."""
    for name in (METRICS, SAMPLES):
        path = run_dir / name
        if not path.is_file():
            continue
        kept = [line for line in path.read_text(encoding="utf-8").split("\n") if _step_of(line) <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
    for folder in checkpoints(run_dir):
        if int(folder.name.rpartition("-")[2]) > step:
            shutil.rmtree(folder)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        # A line that a kill cut in two belongs to a step that will be done again.
        return float("inf")


def write_environment(run_dir: Path, also: Sequence[str] = ()) -> None:
    """Versions and machine, for whoever has to reproduce the run; `also` names more distributions."""
    names = ("grpo-core", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pluggy", "pydantic")
    found = {}
    for name in dict.fromkeys((*names, *also)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    record = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": found,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (run_dir / ENVIRONMENT).write_text(json.dumps(record, indent=1))
