"""`grpo doctor`: what this machine has, and what is broken with its fix."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from ..catalogue import Catalogue
from ..devices.cpu import compiler, memory_bytes
from ..devices.pick import probe
from ..errors import GrpoError
from ..plugins import Raised, attempt, load
from ..requirements import installed_version
from .table import print_table

PACKAGES = ("grpo-core", "torch", "transformers", "tokenizers", "safetensors", "pluggy", "pydantic", "numpy")
OPTIONAL = ("ninja", "gguf", "reasoning-gym", "math-verify", "pyarrow", "tensorboard", "wandb")
LOW_DISK = 2 * 2**30


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo doctor`."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns 1 when something is broken."""
    catalogue = load()
    content = examine(catalogue)
    problems = content["problems"]
    if args.json:
        print(json.dumps(content, indent=1))
        return 1 if problems else 0
    _print_tables(content)
    for problem in problems:
        print(f"\nproblem: {problem['what']}\n  why: {problem['why']}\n  fix: {problem['fix']}")
    for hint in content["hints"]:
        print(f"\nhint: {hint}")
    print(f"\n{len(problems)} problem(s)")
    return 1 if problems else 0


def _print_tables(content: dict[str, Any]) -> None:
    versions = [[name, version or "not installed"] for name, version in content["versions"].items()]
    print_table(["package", "version"], versions)
    print()
    print_table(["system", ""], [[name, str(value)] for name, value in content["system"].items()])
    print()
    devices = [
        [
            row["name"],
            "yes" if row["found"] else "no",
            row["product"],
            " ".join(row["features"]),
            row["reason"],
        ]
        for row in content["devices"]
    ]
    print_table(["device", "found", "product", "features", "why"], devices)


def examine(catalogue: Catalogue) -> dict[str, Any]:
    """Versions, system, devices, problems and hints as plain data."""
    versions = {name: installed_version(name) for name in (*PACKAGES, *OPTIONAL)}
    devices = _devices(catalogue)
    torch = _torch()
    problems = _problems(catalogue, versions)
    if isinstance(torch, Raised):
        problems.append(_problem("torch cannot be imported", str(torch), "install torch again"))
    system = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "processors": _processors(),
        "torch threads": "?" if isinstance(torch, Raised) else torch,
        "memory": _gib(memory_bytes()),
        "free disk here": _gib(shutil.disk_usage(Path.cwd()).free),
        "compiler": compiler() or "none",
        "ninja": shutil.which("ninja") or "none",
    }
    return {
        "versions": versions,
        "system": system,
        "devices": devices,
        "problems": problems,
        "hints": _hints(),
    }


def _devices(catalogue: Catalogue) -> list[dict[str, Any]]:
    rows = []
    for name, device in sorted(catalogue.devices.items()):
        said = probe(device)
        rows.append(
            {
                "name": name,
                "type": device.type,
                "plugin": catalogue.owners[f"device:{name}"],
                "found": said.found,
                "product": said.info.name,
                "count": said.info.count,
                "memory_bytes": said.info.memory_bytes,
                "features": sorted(said.info.features),
                "reason": said.reason,
            }
        )
    return rows


def _torch() -> int | Raised:
    """Threads that torch would use, by importing it: an installed torch that does not load is broken."""

    def threads() -> int:
        import torch

        return torch.get_num_threads()

    return attempt(threads)


def _problems(catalogue: Catalogue, versions: dict[str, str | None]) -> list[dict[str, str]]:
    problems = [_problem(str(failure), failure.error, failure.fix) for failure in catalogue.failures]
    for name in PACKAGES:
        if versions[name] is None:
            problems.append(_problem(f"{name} is not installed", "grpo-core needs it", f"pip install {name}"))
    for kind, table in catalogue.registry.tables.items():
        for name in table:
            try:
                catalogue.registry.get(kind, name)
            except GrpoError as error:
                problems.append(_problem(error.what, error.why, error.fix))
    return problems


def _problem(what: str, why: str, fix: str) -> dict[str, str]:
    return {"what": what, "why": why, "fix": fix}


def _hints() -> list[str]:
    hints = []
    if not compiler():
        hints.append(
            "no C++ compiler: the CPU plugin's compiled kernels cannot be built; install g++ or clang"
        )
    free = shutil.disk_usage(Path.cwd()).free
    if free < LOW_DISK:
        hints.append(f"only {_gib(free)} of disk are free here; checkpoints need more")
    return hints


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
