"""`grpo doctor --device cuda`: what a CUDA host needs, part by part.

torch is imported in a process of its own, so that no CUDA context starts here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from grpo_core.devices.doctor import ADVICE, MISSING, OK, WRONG, Check, row_check
from grpo_core.devices.host import GIB, locked_memory, network, open_files, shared_memory, system_check
from grpo_core.requirements import installed_version

from . import host, libcuda
from .device import BFLOAT16_FROM, CUDA, WORKSPACE, WORKSPACES
from .doctor_packages import packages
from .nvml import Driver, Gpu, read_driver
from .rows import rows

__all__ = ["checks", "rows"]

MACHINES = ("x86_64", "aarch64")
PYTHONS = ((3, 11), (3, 14))
"""What torch 2.13 has wheels for, from the oldest that grpo-core runs on."""
OPEN_FILES = 65536
SHARED = GIB
CARDS = Path("/sys/class/infiniband")
SECONDS = 120
ASK_TORCH = """
import json, torch
print(json.dumps({"count": torch.cuda.device_count(), "archs": torch.cuda.get_arch_list()}))
"""


def checks(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """The parts, the most basic first."""
    driver, built_for = read_driver(), host.torch_built_for()
    yield system_check(MACHINES, PYTHONS)
    lacking = [(lack.what, lack.fix) for lack in host.lacks(driver, built_for)]
    if isinstance(driver, str) or not driver.gpus:
        what, fix = lacking.pop(0)
        yield Check(part="driver", status=MISSING, why=what, fix=fix)
    else:
        yield Check(
            part="driver", status=OK, why=f"{driver.version}, CUDA up to {_dotted(driver.cuda)}, "
            f"{len(driver.gpus)} GPU(s)",
        )  # fmt: skip
        yield from _gpus(driver, environment)
        yield libcuda.check(driver)
    yield from (Check(part="torch", status=WRONG, why=what, fix=fix) for what, fix in lacking)
    if not lacking:
        yield Check(part="torch", status=OK, why=f"{installed_version('torch')}, built for CUDA {built_for}")
        if isinstance(driver, Driver) and driver.gpus:
            yield _torch_sees(host.visible(environment, CUDA.visible_env, driver.gpus), environment)
    yield row_check(rows(), _versions(built_for), "cuda")
    yield from packages(built_for or "", environment)
    yield from _host(environment)
    yield from _settings(environment)


def _versions(built_for: str | None) -> dict[str, str]:
    """What a row could be told by; nothing where torch is a build without CUDA."""
    if not built_for or not built_for[0].isdigit():
        return {}
    names = ("torch", "triton", "fla-core", "flash-attn", "transformer-engine")
    found = {name: installed_version(name) for name in names}
    return {"CUDA": built_for, **{name: version for name, version in found.items() if version}}


def _gpus(driver: Driver, environment: Mapping[str, str]) -> Iterator[Check]:
    shown = host.visible(environment, CUDA.visible_env, driver.gpus)
    if not shown:
        hidden = environment[CUDA.visible_env]
        yield Check(
            part="GPUs", status=WRONG, why=f"{CUDA.visible_env}={hidden} hides them all",
            fix=f"unset {CUDA.visible_env}, or list GPUs by their numbers",
        )  # fmt: skip
        return
    said = ", ".join(dict.fromkeys(_described(gpu) for gpu in shown))
    old = [gpu for gpu in shown if 0 < gpu.capability < BFLOAT16_FROM]
    if old:
        yield Check(
            part="GPUs", status=ADVICE, why=f"{said}: bfloat16 products need 8.0, here they are emulated",
            fix="set train.dtype and rollout.dtype to float32, or use another GPU",
        )  # fmt: skip
    elif len({(gpu.capability, gpu.memory_bytes) for gpu in shown}) > 1:
        yield Check(
            part="GPUs", status=ADVICE, why=f"{said}: the plan counts with the least of them",
            fix=f"export {CUDA.visible_env} with GPUs of one kind",
        )  # fmt: skip
    else:
        yield Check(part="GPUs", status=OK, why=f"{len(shown)} visible: {said}")


def _described(gpu: Gpu) -> str:
    return (
        f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, compute capability {_dotted(gpu.capability)}".strip()
    )


def _torch_sees(shown: tuple[Gpu, ...], environment: Mapping[str, str]) -> Check:
    """Whether torch counts the same GPUs, and has code for them."""
    part = "torch's view"
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=SECONDS, check=False,
            env=dict(environment),
        )  # fmt: skip
        failed = done.returncode != 0
        text = (done.stderr if failed else done.stdout).strip().splitlines()[-1:] or ["nothing"]
    except subprocess.TimeoutExpired:
        failed, text = True, [f"no end after {SECONDS} s"]
    if failed:
        return Check(part=part, status=WRONG, why=f"asking it failed: {text[0]}", fix="install torch again")
    said = json.loads(text[0])
    if said["count"] != len(shown):
        return Check(
            part=part, status=WRONG, why=f"torch counts {said['count']} GPU(s), the driver {len(shown)}",
            fix='see what python -c "import torch; torch.cuda.init()" says',
        )  # fmt: skip
    without = sorted({_dotted(gpu.capability) for gpu in shown if not covered(gpu.capability, said["archs"])})
    if without:
        return Check(
            part=part, status=WRONG,
            why=f"torch has code for {', '.join(said['archs'])}, none for capability {', '.join(without)}",
            fix="install a torch that names the GPU among torch.cuda.get_arch_list()",
        )  # fmt: skip
    return Check(part=part, status=OK, why=f"{said['count']} GPU(s), code for {', '.join(said['archs'])}")


def covered(capability: int, archs: list[str]) -> bool:
    """Whether code for `archs` runs on a capability: machine code of the same major and no higher minor, or
    PTX ("compute_") that is no newer. An "a" behind the number is for exactly that capability."""
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch)
        if found is None:
            continue
        number = int(found.group(2))
        if number == capability or (found.group(1) == "compute" and number <= capability):
            return True
        if found.group(3) != "a" and number // 10 == capability // 10 and number <= capability:
            return True
    return False


def _host(environment: Mapping[str, str]) -> Iterator[Check]:
    yield network("NCCL_SOCKET_IFNAME", environment)
    cards = sorted(path.name for path in CARDS.glob("*"))
    if cards:
        yield Check(part="RDMA", status=OK, why=f"cards: {', '.join(cards)}")
        yield locked_memory()
    yield open_files(OPEN_FILES)
    yield shared_memory(SHARED)


def _settings(environment: Mapping[str, str]) -> Iterator[Check]:
    """Variables that spoil a run."""
    if environment.get(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        yield Check(
            part="cuBLAS workspace", status=WRONG,
            why=f"{WORKSPACE}={environment[WORKSPACE]} gives other bits from run to run",
            fix=f"unset {WORKSPACE}",
        )  # fmt: skip
    for name, why in (
        ("CUDA_LAUNCH_BLOCKING", "waits for every kernel: for debugging"),
        ("PYTORCH_NO_CUDA_MEMORY_CACHING", "takes every tensor from the driver: for debugging"),
    ):
        if environment.get(name, "0") not in ("", "0"):
            yield Check(
                part="debugging", status=ADVICE, why=f"{name}={environment[name]} {why}", fix=f"unset {name}"
            )


def _dotted(value: int) -> str:
    return f"{value // 10}.{value % 10}"
