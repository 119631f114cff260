"""Which libcuda programs load: the driver's own, or one that a container or a toolkit put before it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from grpo_core.devices.doctor import ADVICE, MISSING, OK, UNKNOWN, WRONG, Check

from .nvml import Driver

NAME = "libcuda.so.1"
MAPS = Path("/proc/self/maps")


def check(driver: Driver) -> Check:
    """Whether libcuda is there and belongs to the driver. Nothing of it is called: that would start CUDA."""
    try:
        ctypes.CDLL(NAME)
    except OSError as error:
        return Check(
            part="libcuda", status=MISSING, why=f"{NAME} cannot be loaded: {error}",
            fix="in a container: --gpus all with NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )  # fmt: skip
    return judge(loaded(), driver)


def loaded() -> Path | None:
    """The file that was loaded, its links followed; None where the system does not tell."""
    try:
        text = MAPS.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"(/\S*/libcuda\.so\S*)$", text, re.MULTILINE)
    return Path(found.group(1)).resolve() if found else None


def judge(path: Path | None, driver: Driver) -> Check:
    """What the file's name says: "libcuda.so.580.65.06" belongs to driver 580.65.06."""
    version = "" if path is None else path.name.removeprefix("libcuda.so.")
    if path is None or not re.fullmatch(r"[\d.]{5,}", version):
        return Check(part="libcuda", status=UNKNOWN, why=f"{path or NAME} does not tell its version")
    if version == driver.version:
        return Check(part="libcuda", status=OK, why=f"{path}, of this driver")
    theirs, ours = _numbers(version), _numbers(driver.version)
    if theirs > ours:
        return Check(
            part="libcuda", status=ADVICE,
            why=f"{path} is newer than driver {driver.version}: compatibility for data centre GPUs only",
            fix="update the driver, or see that `nvidia-smi` and torch.cuda.init() both work",
        )  # fmt: skip
    return Check(
        part="libcuda", status=WRONG,
        why=f"{path} is older than driver {driver.version} and hides its library",
        fix=f"take {path.parent} out of LD_LIBRARY_PATH and /etc/ld.so.conf.d",
    )  # fmt: skip


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
