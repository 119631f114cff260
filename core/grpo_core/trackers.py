"""Where the metrics of a run go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
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


class JsonlFile:
    """Rows of JSON, one a line, on the disk as soon as they are written.

    `resumed_step` is the last finished step of a run that goes on: rows after it, and a last line that
    a kill cut in two, are dropped. Values that are not finite are written as null (JSON has no NaN).
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        if resumed_step is not None and path.exists():
            _keep_until(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it."""
        self._file.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class JsonlTracker:
    """metrics.jsonl: {"step": 12, "reward/mean": 0.41, ...} a line."""

    def __init__(self, run_dir: Path, resumed_step: int | None = None) -> None:
        self._file = JsonlFile(run_dir / "metrics.jsonl", resumed_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the step's row."""
        self._file.append({"step": step, **values})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Scalars under <run>/tensorboard; rows of steps that are done again are hidden by TensorBoard."""

    def __init__(self, run_dir: Path, config: Config, resumed_step: int | None = None) -> None:
        _need("tensorboard", "tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_step is None else resumed_step + 1
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)  # type: ignore[no-untyped-call]

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

    def __init__(self, run_dir: Path, config: Config, resumed_step: int | None = None) -> None:
        _need("wandb", "wandb", "wandb")
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


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log to each."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


OWN = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


def open_trackers(
    run_dir: Path, config: Config, registry: Registry, *, resumed_step: int | None = None
) -> Trackers:
    """metrics.jsonl and the trackers of `run.trackers`.

    `resumed_step` is the last finished step of a run that goes on. Raises `ConfigError` for a name that
    nobody registered or a tracker whose package is not installed; nothing was opened then.
    """
    opened: list[Tracker] = []
    for name in config.run.trackers:
        own = OWN.get(name)
        opened.append(
            own(run_dir, config, resumed_step) if own else registry.get("tracker", name)(run_dir, config)
        )
    return Trackers([JsonlTracker(run_dir, resumed_step), *opened])


def _need(package: str, tracker: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"tracker {tracker!r} cannot be used",
            why=f"the package {package} is not installed",
            fix=f'pip install "grpo-core[{extra}]", or remove it from run.trackers',
        )


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _keep_until(path: Path, step: int) -> None:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and row.get("step", 0) <= step:
            kept.append(line)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)
