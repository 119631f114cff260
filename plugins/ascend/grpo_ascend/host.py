"""What an Ascend host needs, looked for without importing torch or torch_npu; each lack with its fix."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from grpo_core.devices.base import Lack
from grpo_core.requirements import installed_version

NODES = "/dev/davinci[0-9]*"
"""One device file for each chip."""
MANAGERS = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
"""Device files that every process needs beside its chip's."""
DRIVER = Path("/usr/local/Ascend/driver/version.info")
TOOLKITS = ("/usr/local/Ascend/ascend-toolkit/latest", "/usr/local/Ascend/cann")
TOOLKIT_ENV = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
"""Variables that CANN's set_env.sh sets."""
SIMULATED = "simulated"
"""File in the toolkit's folder that a simulated CANN brings: its text is the number of NPUs."""
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


def chips(environment: Mapping[str, str] = os.environ) -> int:
    """Chips with a device file, or those of a simulated CANN, whether or not this process may see them."""
    return simulated(environment) or len(glob.glob(NODES))


def simulated(environment: Mapping[str, str] = os.environ) -> int:
    """Chips of a simulated CANN, where that is set up; else 0."""
    files = [Path(folder) / SIMULATED for folder in _toolkits(environment)]
    return next((int(file.read_text()) for file in files if file.is_file()), 0)


def lacks(environment: Mapping[str, str] = os.environ) -> Iterator[Lack]:
    """What is missing, the most basic first."""
    if simulated(environment):
        pass
    elif not chips(environment):
        yield Lack(
            part="driver",
            what=f"no device file matches {NODES}",
            fix="install the Ascend driver and firmware; in a container pass --device=/dev/davinci0 or use "
            "the ascend runtime",
        )
    else:
        missing = [path for path in MANAGERS if not Path(path).exists()]
        if missing:
            yield Lack(
                part="driver",
                what=f"{' and '.join(missing)} are not here",
                fix="pass them to the container too: " + " ".join(f"--device={path}" for path in missing),
            )
        if not DRIVER.exists():
            yield Lack(
                part="driver",
                what=f"{DRIVER} is not here",
                fix="mount the driver: -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro",
            )
    yield from _software(environment)


def _software(environment: Mapping[str, str]) -> Iterator[Lack]:
    if toolkit(environment) is None:
        here = [folder for folder in TOOLKITS if Path(folder).is_dir()]
        yield Lack(
            part="CANN",
            what="CANN is not set up in this shell" if here else "CANN is not installed",
            fix=f"source {here[0]}/set_env.sh" if here else f"install the CANN toolkit, then {SET_ENV}",
        )
    if importlib.util.find_spec("torch_npu") is None:
        yield Lack(
            part="torch-npu", what="package torch_npu is not installed", fix='pip install "grpo-core[ascend]"'
        )
        return
    ours, theirs = installed_version("torch"), installed_version("torch-npu")
    if ours and theirs and release(ours) != release(theirs):
        yield Lack(
            part="torch-npu",
            what=f"torch {ours} and torch-npu {theirs} are no pair",
            fix=f"pip install torch=={release(theirs)}, or the torch-npu of torch {release(ours)}",
        )


def toolkit(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Folder of the CANN that is set up in this shell."""
    return next((Path(folder) for folder in _toolkits(environment) if Path(folder).is_dir()), None)


def _toolkits(environment: Mapping[str, str]) -> list[str]:
    return [environment[name] for name in TOOLKIT_ENV if environment.get(name)]


def release(version: str) -> str:
    """ "2.7.1" of "2.7.1.post11+cpu"; torch-npu pins torch down to the third number."""
    return ".".join(version.partition("+")[0].split(".")[:3])


def visible(environment: Mapping[str, str], name: str, present: int) -> int:
    """Chips that the process may use, by the variable that limits them."""
    value = environment.get(name)
    if value is None:
        return present
    return min(present, len([item for item in value.split(",") if item.strip().isdigit()]))
