"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo_core.checkpoint import RunState, checkpoints, latest_checkpoint, read_state, save_checkpoint
from grpo_core.errors import CheckpointError


def state(step: int) -> RunState:
    return RunState(step=step, world=1, plan_id="p")


def writer(text: str):
    return lambda folder: (folder / "weights.bin").write_text(text)


def test_round_trip_and_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), writer(str(step)), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    last = latest_checkpoint(tmp_path)
    assert last is not None and read_state(last) == state(3)
    assert (last / "weights.bin").read_text() == "3"


def test_full_disk_keeps_the_last_good_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), writer("one"), keep=2)

    def full(folder: Path) -> None:
        (folder / "weights.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="step 2") as caught:
        save_checkpoint(tmp_path, state(2), full, keep=2)
    assert "No space left" in caught.value.why and "step-00000001" in caught.value.why
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state(1), writer("0123456789"), keep=1)
    (folder / "weights.bin").write_text("0123")
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_state(folder)
    assert "4 of 10 bytes" in caught.value.why
    (folder / "weights.bin").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_state(folder)
    assert "weights.bin (missing)" in caught.value.why


def test_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_state(tmp_path)


SLOW_WRITER = """
import sys, time
from pathlib import Path
from grpo_core.checkpoint import RunState, save_checkpoint

def slow(folder):
    with open(folder / "weights.bin", "w") as file:
        file.write("half"); file.flush()
        print("writing", flush=True)
        time.sleep(60)

save_checkpoint(Path(sys.argv[1]), RunState(step=2, world=1, plan_id="p"), slow, keep=2)
"""


def test_sigkill_while_saving_leaves_the_last_good_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1), writer("one"), keep=2)
    child = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(0.01)
    last = latest_checkpoint(tmp_path)
    assert last is not None and read_state(last) == state(1)
    save_checkpoint(tmp_path, state(2), writer("two"), keep=2)
    assert not list((tmp_path / "checkpoints").glob(".partial-*"))
