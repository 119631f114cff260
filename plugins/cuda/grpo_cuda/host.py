"""What a CUDA host needs, looked for without importing torch; each lack with its fix."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from grpo_core.devices.base import Lack

from .nvml import Driver, Gpu

INSTALL = "pip install torch --index-url https://download.pytorch.org/whl/cu130"


def lacks(driver: Driver | str, built_for: str | None) -> Iterator[Lack]:
    """What is missing, the most basic first. `built_for` is what `torch_built_for` said."""
    if isinstance(driver, str):
        yield Lack(
            part="driver",
            what=driver,
            fix="install the NVIDIA driver; in a container pass --gpus all (NVIDIA container toolkit)",
        )
    elif not driver.gpus:
        yield Lack(
            part="driver", what=f"driver {driver.version} sees no GPU", fix="nvidia-smi must list the GPU"
        )
    if built_for is None:
        yield Lack(part="torch", what="package torch is not installed", fix=INSTALL)
    elif not built_for:
        yield Lack(part="torch", what="this torch is built without CUDA", fix=INSTALL)
    elif not built_for[0].isdigit():
        yield Lack(part="torch", what=f"this torch is built for {built_for}, not for CUDA", fix=INSTALL)
    elif isinstance(driver, Driver) and 0 < driver.cuda // 10 < int(built_for.partition(".")[0]):
        served = f"{driver.cuda // 10}.{driver.cuda % 10}"
        yield Lack(
            part="driver",
            what=f"driver {driver.version} serves CUDA up to {served}, this torch is built for {built_for}",
            fix=f"update the driver, or install a torch for CUDA {driver.cuda // 10}",
        )


def torch_built_for(folder: Path | None = None) -> str | None:
    """CUDA's version of the installed torch ("12.8"), "" for a build without, "ROCm" or another maker's
    runtime, None without torch. Read off its version.py: importing torch takes a second."""
    if folder is None:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = dict(re.findall(r"^(cuda|hip|xpu)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE))
    return found.get("cuda") or ("ROCm" if "hip" in found else "XPU" if "xpu" in found else "")


def visible(environment: Mapping[str, str], name: str, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that the process may use, by the variable that limits them: indices or beginnings of
    identifiers, of which the first that fits no GPU hides itself and all after it. MIG slices count as one
    GPU each, with the facts of the first GPU."""
    value = environment.get(name)
    if value is None:
        return gpus
    chosen: list[Gpu] = []
    for item in map(str.strip, value.split(",")):
        found = [gpu for gpu in gpus if item.startswith("GPU-") and gpu.uuid.startswith(item)]
        if item.isdigit():
            found = list(gpus[int(item) : int(item) + 1])
        elif item.startswith("MIG-"):
            found = list(gpus[:1])
        if not found:
            break
        chosen.append(found[0])
    return tuple(chosen)
