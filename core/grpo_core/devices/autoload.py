"""torch's own loading of device backends, which `import torch` does unless it is told not to.

torch imports every package with an entry point in the group `torch.backends`, whatever the run uses, and one
that cannot be loaded takes `import torch` down with it: a chip's package on a host without its runtime. A run
of ours uses the device that its plan names, and `Device.open` imports what that one needs. So the command
line switches torch's way off, and `grpo doctor` tells what such a package does to other programs.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

GROUP = "torch.backends"
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch reads it while it is imported; "0" is off."""
SECONDS = 120
"""A chip's package takes a few seconds to import; a driver that hangs must not hang the doctor."""


def switch_off() -> None:
    """Keep torch from loading backends here and in processes started from here, unless the user set it."""
    os.environ.setdefault(SWITCH, "0")


def backend_packages() -> tuple[str, ...]:
    """Distributions that torch would load, with their versions."""
    found = {point.dist for point in metadata.entry_points(group=GROUP) if point.dist is not None}
    return tuple(sorted(f"{dist.name} {dist.version}" for dist in found))


def autoload_problem() -> dict[str, str] | None:
    """What, why and fix where `import torch` fails in a program that does not switch it off, else None.

    It is tried in a process of its own, and only where there is a package to load.
    """
    packages = backend_packages()
    if not packages:
        return None
    import subprocess

    environment = {key: value for key, value in os.environ.items() if key != SWITCH}
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import torch"], capture_output=True, text=True, timeout=SECONDS,
            check=False, env=environment,
        )  # fmt: skip
        why = "" if done.returncode == 0 else first_cause(done.stderr) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"no end after {SECONDS} s"
    if not why:
        return None
    named = " and ".join(packages)
    return {
        "what": f"`import torch` fails because torch loads {named} along with it",
        "why": f"{why}; grpo itself goes on, as it loads a backend only for the device that is asked for",
        "fix": f"set up the runtime of {named} (`grpo doctor --device NAME` lists what it lacks), or "
        f"export {SWITCH}=0, or uninstall it",
    }


def first_cause(trace: str) -> str:
    """The innermost error of a traceback: the last line of its first block, "" where there is none."""
    lines = trace.splitlines()
    inside = False
    for line in lines:
        if line.startswith("Traceback "):
            inside = True
        elif inside and line and not line[0].isspace():
            return line
    return lines[-1] if lines else ""
