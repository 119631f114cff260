"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder `checkpoints/step-00000012`. It is written under a temporary name, its files and
the folder are flushed to the disk, and only then does it take its name: whatever has the name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

PREFIX = "step-"
STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """Where a run stands; with the seeds of the config it fixes everything that is to come."""

    step: int
    """Finished steps."""
    world: int
    """Data-parallel ranks that wrote it."""
    plan_id: str


def save_checkpoint(run_dir: Path, state: RunState, write: Callable[[Path], None], *, keep: int) -> Path:
    """Write a checkpoint through `write(folder)`, then drop all but the newest `keep`.

    Raises `CheckpointError` when the disk is full or not writable; earlier checkpoints stay as they were
    and the partial folder is removed.
    """
    root = run_dir / "checkpoints"
    final = root / f"{PREFIX}{state.step:08d}"
    partial = root / f".partial-{state.step:08d}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_partial(root)
        partial.mkdir()
        write(partial)
        sizes = {
            str(path.relative_to(partial)): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        record = {"format": FORMAT, "state": asdict(state), "files": sizes}
        (partial / STATE).write_text(json.dumps(record, indent=1))
        _flush(partial)
        aside = root / f".partial-replaced-{state.step:08d}"
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        _fsync(root)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(run_dir)
        cause = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written to {root}",
            why=f"{cause}; the last good one is {last.name if last else 'none'}",
            fix="free some space or mend the folder's permissions, then continue with"
            f" `grpo train --resume {run_dir}`",
        ) from error
    for old in checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{PREFIX}*"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = checkpoints(run_dir)
    return found[-1] if found else None


def read_state(folder: Path) -> RunState:
    """The state of a checkpoint. Raises `CheckpointError` when a file is missing or has another size."""
    try:
        record = json.loads((folder / STATE).read_text())
        state, files = RunState(**record["state"]), record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint of grpo-core",
            why=f"its {STATE} cannot be read: {error}",
            fix="name a folder `checkpoints/step-...` of a run, or a run folder",
        ) from error
    wrong = [
        f"{name} ({'missing' if not path.is_file() else f'{path.stat().st_size} of {size} bytes'})"
        for name, size in files.items()
        for path in [folder / name]
        if not path.is_file() or path.stat().st_size != size
    ]
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} is damaged",
            why="; ".join(wrong),
            fix="delete this folder; resuming then takes the checkpoint before it",
        )
    return state


def remove_partial(root: Path) -> None:
    """Remove what killed writers left behind."""
    for left in root.glob(".partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
