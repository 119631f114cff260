"""The environment of a process with the simulated CANN, and a command in it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from grpo_core.errors import ConfigError

from .build import CACHE, NUMERIC, build, installed

HOOK = Path(__file__).parent / "hook"
MARKER = "simulated"
"""File in the toolkit's folder by which a plugin knows the simulation; it holds the number of NPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The host that is simulated."""

    devices: int = 2
    memory_bytes: int = 4 << 30
    """Of each NPU."""
    soc: str = "Ascend910B3"


def environment(machine: Machine, *, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to set, beside those that are `given`. Builds the libraries where they are not yet.

    Raises `PluginError` where torch-npu or a compiler is missing, `ConfigError` for a machine that cannot be.
    """
    if not 1 <= machine.devices <= 64 or machine.memory_bytes < 1 << 20:
        raise ConfigError(
            f"a simulated host with {machine.devices} NPUs of {machine.memory_bytes} bytes",
            why="it has 1 to 64 NPUs with a MiB or more",
            fix="change --devices or --memory",
        )
    home = Path.home() / CACHE
    libraries = build(home, installed())
    toolkit = _toolkit(home, machine)
    return {
        "LD_LIBRARY_PATH": _joined(str(libraries), given.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined(str(HOOK), given.get("PYTHONPATH")),
        "ASCEND_HOME_PATH": str(toolkit),
        "ASCEND_TOOLKIT_HOME": str(toolkit),
        "ASCEND_OPP_PATH": str(toolkit / "opp"),
        "GRPO_CANN_NUMERIC": str(libraries / NUMERIC),
        "GRPO_CANN_DEVICES": str(machine.devices),
        "GRPO_CANN_MEMORY": str(machine.memory_bytes),
        "GRPO_CANN_SOC": machine.soc,
        "TASK_QUEUE_ENABLE": "0",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def _toolkit(home: Path, machine: Machine) -> Path:
    """A folder that stands for CANN's; machines that are alike share one."""
    name = hashlib.sha256(repr(machine).encode()).hexdigest()[:12]
    folder = home / f"toolkit-{name}"
    # torch_npu looks for these before it loads.
    for part in ("opp", "runtime", "compiler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    partial = folder / f"{MARKER}.{os.getpid()}"
    partial.write_text(f"{machine.devices}\n", encoding="utf-8")
    partial.replace(folder / MARKER)
    return folder


def _joined(first: str, rest: str | None) -> str:
    return f"{first}{os.pathsep}{rest}" if rest else first


def run(command: Sequence[str], machine: Machine) -> int:
    """The exit code of a command with the simulated CANN; 128 and the signal's number for one killed.

    Raises as `environment` does, and `ConfigError` for a command that cannot be started.
    """
    here = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = tempfile.mkdtemp(prefix="grpo-cann-", dir=here)
    try:
        words = {**os.environ, **environment(machine), "GRPO_CANN_FOLDER": folder}
        program = shutil.which(command[0])
        if program is None:
            raise ConfigError(
                f"{command[0]} cannot be started", why="there is no such program", fix="give its path"
            )
        process = subprocess.Popen([program, *command[1:]], env=words)

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code
