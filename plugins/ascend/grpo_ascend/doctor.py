"""`grpo doctor --device ascend`: what an Ascend host needs, part by part.

torch_npu is loaded in a process of its own, to see whether it can be; nothing here starts a runtime.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from pathlib import Path

from grpo_core.devices.autoload import SWITCH, first_cause
from grpo_core.devices.doctor import ADVICE, MISSING, OK, UNKNOWN, WRONG, Check, row_check
from grpo_core.devices.host import GIB, network, open_files, shared_memory, system_check
from grpo_core.requirements import installed_version, unmet

from . import host
from .rows import rows

__all__ = ["checks", "rows"]

MACHINES = ("x86_64", "aarch64")
PYTHONS = ((3, 11), (3, 14))
"""What torch-npu 2.13 has wheels for, from the oldest that grpo-core runs on."""
OPEN_FILES = 65536
SHARED = GIB
"""As the vendor's pages start their containers: --shm-size=1g."""
CARD_NETWORK = Path("/etc/hccn.conf")
"""Addresses of the chips' own network ports."""
SECONDS = 120
INSTALL = "see `grpo doctor --device ascend --install-plan"


def checks(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """The parts, the most basic first."""
    yield system_check(MACHINES, PYTHONS)
    lacking: dict[str, list[Check]] = {}
    for lack in host.lacks(environment):
        check = Check(part=lack.part, status=MISSING, why=lack.what, fix=lack.fix)
        lacking.setdefault(lack.part, []).append(check)
    yield from lacking.get("driver") or _driver(environment)
    yield from lacking.get("CANN") or _cann(environment)
    yield from lacking.get("torch-npu") or _package(environment)
    yield row_check(rows(), _versions(environment), "ascend")
    yield _vllm_ascend()
    yield _mindspeed()
    yield _jemalloc(environment)
    yield network("HCCL_SOCKET_IFNAME", environment)
    yield _card_network(environment)
    yield open_files(OPEN_FILES)
    yield shared_memory(SHARED)
    yield from _settings(environment)


def _versions(environment: Mapping[str, str]) -> dict[str, str]:
    """What a row could be told by, by component."""
    found = {name: installed_version(name) for name in ("torch", "torch-npu", "vllm", "vllm-ascend")}
    # Without its backend, the torch of a laptop says nothing of a row.
    found = found if found["torch-npu"] else {}
    folder = host.toolkit(environment)
    found["CANN"] = _cann_version(folder, "toolkit") if folder else None
    return {key: value for key, value in found.items() if value}


def _driver(environment: Mapping[str, str]) -> Iterator[Check]:
    count = host.chips(environment)
    if host.simulated(environment):
        yield Check(part="driver", status=OK, why=f"{count} chip(s) of a simulated CANN: this is no hardware")
        return
    shown = host.visible(environment, "ASCEND_RT_VISIBLE_DEVICES", count)
    version = re.search(r"^Version=(\S+)", host.DRIVER.read_text(errors="replace"), re.MULTILINE)
    said = f"{count} chip(s), driver {version.group(1) if version else 'of unknown version'}"
    if not shown:
        hidden = environment["ASCEND_RT_VISIBLE_DEVICES"]
        yield Check(
            part="driver", status=WRONG, why=f"{said}; ASCEND_RT_VISIBLE_DEVICES={hidden} hides them all",
            fix="unset ASCEND_RT_VISIBLE_DEVICES, or list chips by their numbers",
        )  # fmt: skip
    else:
        yield Check(part="driver", status=OK, why=f"{said}, {shown} visible")
    if shutil.which("npu-smi", path=environment.get("PATH")) is None:
        yield Check(
            part="npu-smi", status=ADVICE,
            why="npu-smi is not on PATH: it shows health, memory and processes",
            fix="in a container: -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro",
        )  # fmt: skip


def _cann(environment: Mapping[str, str]) -> Iterator[Check]:
    folder = host.toolkit(environment)
    assert folder is not None  # else it would be lacking
    version = _cann_version(folder, "toolkit")
    if host.simulated(environment):
        yield Check(part="CANN", status=OK, why=f"simulated, in {folder}")
        return
    yield Check(part="CANN", status=OK, why=f"{version or 'of unknown version'}, in {folder}")
    ops = _cann_version(folder, "ops")
    kernels = sorted(path.name for path in folder.glob("opp*/built-in/op_impl/ai_core/tbe/kernel/ascend*"))
    if ops and version and ops != version:
        yield Check(
            part="CANN ops", status=WRONG, why=f"the ops package is {ops}, the toolkit {version}",
            fix=f"install the ops package {version} of the chip",
        )  # fmt: skip
    elif ops or kernels:
        yield Check(part="CANN ops", status=OK, why=" ".join([ops, *kernels]).strip())
    else:
        yield Check(
            part="CANN ops", status=ADVICE, why=f"no compiled kernels were found in {folder}",
            fix="install the ops (kernels) package of the chip, of the toolkit's version",
        )  # fmt: skip
    if environment.get("ATB_HOME_PATH"):
        yield Check(part="NNAL", status=OK, why=f"in {environment['ATB_HOME_PATH']}")
    else:
        yield Check(
            part="NNAL", status=ADVICE,
            why="libatb.so is not set up; vllm-ascend needs it, this plugin does not",
            fix="install NNAL of the toolkit's version, then source /usr/local/Ascend/nnal/atb/set_env.sh",
        )  # fmt: skip


def _cann_version(folder: Path, package: str) -> str:
    """Version of CANN's "toolkit" or "ops" package, "" where its files do not tell."""
    for path in sorted(folder.glob(f"*-linux/ascend_{package}_install.info")):
        found = re.search(r"^version=(\S+)", path.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found.group(1)
    return ""


def _package(environment: Mapping[str, str]) -> Iterator[Check]:
    theirs, ours = installed_version("torch-npu"), installed_version("torch")
    yield Check(part="torch-npu", status=OK, why=f"torch-npu {theirs} with torch {ours}")
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import torch_npu"], capture_output=True, text=True, timeout=SECONDS,
            check=False, env={**environment, SWITCH: "0"},
        )  # fmt: skip
        why = "" if done.returncode == 0 else first_cause(done.stderr) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"no end after {SECONDS} s"
    if not why:
        yield Check(part="import torch_npu", status=OK, why="it loads")
        return
    yield Check(
        part="import torch_npu", status=WRONG, why=why,
        fix=f"mend CANN first: {host.SET_ENV}; for other programs on a host without it: export {SWITCH}=0",
    )  # fmt: skip


def _vllm_ascend() -> Check:
    part = "vllm-ascend"
    engine, backend = installed_version("vllm"), installed_version("vllm-ascend")
    if backend is None:
        return Check(
            part=part, status=ADVICE, why="not installed; grpo's own engine serves rollouts without it",
            fix=f"for vLLM {INSTALL} --row torch-2.10`",
        )  # fmt: skip
    if engine is None or host.release(engine) != host.release(backend):
        have = f"vllm {engine}" if engine else "no vllm"
        return Check(
            part=part, status=ADVICE,
            why=f"vllm-ascend {backend} with {have}: they go together release by release",
            fix=f"VLLM_TARGET_DEVICE=empty pip install --no-binary vllm vllm=={host.release(backend)}",
        )  # fmt: skip
    wants = [item for item in metadata.requires("vllm-ascend") or [] if re.match(r"(torch|triton)\b", item)]
    lacking = [reason for reason in map(unmet, wants) if reason]
    if lacking:
        return Check(
            part=part, status=ADVICE, why=f"vllm-ascend {backend} {'; '.join(lacking)}",
            fix=f"{INSTALL}` for versions that go together",
        )  # fmt: skip
    return Check(part=part, status=OK, why=f"vllm-ascend {backend} with vllm {engine}")


def _mindspeed() -> Check:
    spec = util.find_spec("mindspeed")
    if spec is None:
        return Check(
            part="MindSpeed", status=ADVICE, why="not installed; only Megatron on Ascend needs it",
            fix=f"for Megatron {INSTALL} --row torch-2.7`",
        )  # fmt: skip
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "megatron_adaptor.py").is_file() for folder in folders):
        return Check(
            part="MindSpeed", status=ADVICE,
            why="what is here under its name has no mindspeed.megatron_adaptor: PyPI's is a placeholder",
            fix=f"pip uninstall mindspeed; {INSTALL} --row torch-2.7`",
        )  # fmt: skip
    return Check(part="MindSpeed", status=OK, why=f"in {folders[0]}; imported by the Megatron engine alone")


def _jemalloc(environment: Mapping[str, str]) -> Check:
    preloaded = [
        item for item in re.split(r"[\s:]+", environment.get("LD_PRELOAD", "")) if "jemalloc" in item
    ]
    gone = [item for item in preloaded if "/" in item and not Path(item).exists()]
    if preloaded and not gone:
        return Check(part="jemalloc", status=OK, why=f"LD_PRELOAD={preloaded[0]}")
    library = f"/usr/lib/{platform.machine()}-linux-gnu/libjemalloc.so.2"
    first = "" if Path(library).exists() else "apt-get install libjemalloc2, then "
    why = f"LD_PRELOAD names {gone[0]}, which is not here" if gone else "not preloaded"
    return Check(
        part="jemalloc", status=ADVICE, why=f"{why}; without it, long runs keep host memory that they freed",
        fix=f"{first}export LD_PRELOAD={library} before Python starts",
    )  # fmt: skip


def _card_network(environment: Mapping[str, str]) -> Check:
    if not host.chips(environment) or host.simulated(environment):
        return Check(part="chips' network", status=UNKNOWN, why="no chips to ask")
    if CARD_NETWORK.exists():
        return Check(part="chips' network", status=OK, why=f"{CARD_NETWORK} is here")
    return Check(
        part="chips' network", status=ADVICE, why=f"{CARD_NETWORK} is not here; HCCL needs it between hosts",
        fix=f"set the ports up with hccn_tool; in a container: -v {CARD_NETWORK}:{CARD_NETWORK}:ro",
    )  # fmt: skip


def _settings(environment: Mapping[str, str]) -> Iterator[Check]:
    """Variables of CANN and torch_npu that spoil a run."""
    both = [name for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF") if environment.get(name)]
    if len(both) == 2:
        yield Check(
            part="allocator settings", status=WRONG, why=f"{' and '.join(both)} are set: torch_npu exits",
            fix=f"unset {both[0]}",
        )  # fmt: skip
    if environment.get("INF_NAN_MODE_ENABLE") == "0":
        yield Check(
            part="infinities", status=WRONG,
            why="INF_NAN_MODE_ENABLE=0: overflows saturate and NaN becomes 0, so a broken step looks sound",
            fix="unset INF_NAN_MODE_ENABLE",
        )  # fmt: skip
    if environment.get("ASCEND_LAUNCH_BLOCKING") == "1":
        yield Check(
            part="launches", status=ADVICE, why="ASCEND_LAUNCH_BLOCKING=1 waits for every op: for debugging",
            fix="unset ASCEND_LAUNCH_BLOCKING",
        )  # fmt: skip
    if environment.get("TASK_QUEUE_ENABLE") == "2":
        yield Check(
            part="launches", status=ADVICE, why="TASK_QUEUE_ENABLE=2 cannot be captured in graphs",
            fix="export TASK_QUEUE_ENABLE=1",
        )  # fmt: skip
