"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .config import Config
from .errors import ConfigError

if TYPE_CHECKING:
    from .registry import Registry


class Tracker(Protocol):
    """A sink of metrics. `registry.tracker(name, factory)` takes `factory(run_dir, config)`."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of `step`; called once a step, and once more when the step was evaluated."""
        ...

    def close(self) -> None: ...


class JsonlTracker:
    """metrics.jsonl: {"step": 12, "reward/mean": 0.41, ...} a line, on the disk when `log` returns.

    Values that are not finite are written as null, since JSON has no NaN. A resumed run appends;
    `rundir.drop_after` has dropped the rows of steps that are done again.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the step's row."""
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Scalars under <run>/tensorboard; steps that a resumed run does again are hidden by TensorBoard."""

    def __init__(self, run_dir: Path, first_step: int = 0) -> None:
        _need("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        purge = first_step + 1 if first_step else None
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbTracker:
    """A W&B run under <run>/wandb; offline unless an API key is there, so that it never asks or waits."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        _need("wandb")
        import wandb

        self._run: Any = wandb.init(
            project="grpo-core",
            name=config.run.name,
            # The same folder is the same run, also when it goes on after an interruption.
            id=hashlib.blake2b(str(run_dir.resolve()).encode(), digest_size=6).hexdigest(),
            resume="allow",
            dir=str(run_dir),
            config=config.model_dump(),
            # None leaves the choice to wandb's own settings.
            mode=None if wandb.api.api_key else "offline",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send one row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TrackerFactory = Callable[[Path, Config], Tracker]


def open_trackers(config: Config, run_dir: Path, registry: Registry, *, first_step: int = 0) -> list[Tracker]:
    """metrics.jsonl and the trackers of `run.trackers`.

    `first_step` counts the steps that a resumed run has finished. Raises `ConfigError` for a name that
    nobody registered or a tracker whose package is not installed.
    """
    opened: list[Tracker] = [JsonlTracker(run_dir)]
    for name in config.run.trackers:
        if name == "tensorboard":
            opened.append(TensorBoardTracker(run_dir, first_step))
        elif name == "wandb":
            opened.append(WandbTracker(run_dir, config))
        else:
            factory: TrackerFactory = registry.get("tracker", name)
            opened.append(factory(run_dir, config))
    return opened


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"tracker {package!r} cannot be used",
            why=f"the package {package} is not installed",
            fix=f'pip install "grpo-core[{package}]", or remove it from run.trackers',
        )
