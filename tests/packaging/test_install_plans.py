"""The install plans of both chips, run by a shell with commands that only write down how they were called."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from built_wheels import ROOT, wheel_of

from grpo_ascend.rows import rows as ascend_rows
from grpo_core.cli.install_plan import MACHINES, script
from grpo_core.devices.doctor import Row
from grpo_cuda.rows import rows as cuda_rows

PLANS = [
    pytest.param(device, row, machine, id=f"{device}-{row.name}-{machine}")
    for device, rows in (("ascend", ascend_rows), ("cuda", cuda_rows))
    for row in rows()
    for machine in MACHINES
]
FAKES = ("pip", "grpo", "git", "apt-get")
CANN = "/usr/local/Ascend"


@pytest.fixture
def bin_(tmp_path: Path) -> Path:
    """Commands that append their arguments to the file "log", and a CANN that can be sourced."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in FAKES:
        (folder / name).write_text(
            f'#!/bin/sh\nprintf "%s " {name} "$@" >> {tmp_path}/log; echo >> {tmp_path}/log\n'
        )
        (folder / name).chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    for place in ("cann", "nnal/atb"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "set_env.sh").write_text("export SOURCED=yes\n")
    return folder


def run(text: str, bin_: Path) -> list[str]:
    text = text.replace(CANN, str(bin_.parent))
    done = subprocess.run(
        ["sh", "-eu"], input=text, text=True, capture_output=True, timeout=600, check=False,
        env={"PATH": f"{bin_}:/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return (bin_.parent / "log").read_text().splitlines()


@pytest.mark.parametrize(("device", "row", "machine"), PLANS)
def test_a_plan_runs_with_the_rows_constraints(device: str, row: Row, machine: str, bin_: Path) -> None:
    text = script(row, device, machine)
    calls = run(text, bin_)
    assert calls[-1] == f"grpo doctor --device {device} "
    installs = [call for call in calls if call.startswith("pip install")]
    assert f"grpo-core[{device}]" in installs[-1] and len(installs) == len(calls) - 1
    for call in installs:
        words = call.split()
        constraints = Path(words[words.index("-c") + 1])
        assert (
            constraints.name == f"{row.name}.txt"
            and f"torch=={row.versions['torch']}" in constraints.read_text()
        )


@pytest.mark.parametrize(("device", "row", "machine"), PLANS)
def test_optional_steps_are_commands_too(device: str, row: Row, machine: str, bin_: Path) -> None:
    text = script(row, device, machine)
    everything = text.replace("\n# $ ", "\n")
    assert everything.count("\n# ") < text.count("\n# ")
    assert len(run(everything, bin_)) > len(list(plain(text)))


def plain(text: str) -> Iterator[str]:
    """Commands that are written down by a fake."""
    return (line for line in text.splitlines() if line.startswith(FAKES))


@pytest.mark.slow
def test_the_wheel_holds_the_constraints(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    names = zipfile.ZipFile(wheel_of(ROOT, tmp_path / "dist")).namelist()
    for row in (*ascend_rows(), *cuda_rows()):
        assert row.constraints in names
