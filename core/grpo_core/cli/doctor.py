"""`grpo doctor`: what this machine has, and what is broken with its fix.

`--device NAME` looks at what one device needs of the host, `--matrix` shows the versions that were tested
together, and `--install-plan` the commands for one row of them. What they say comes from the plugins.
"""

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
from ..devices.autoload import autoload_problem
from ..devices.cpu import compiler, memory_bytes
from ..devices.doctor import pick_row
from ..devices.pick import probe
from ..errors import ConfigError, GrpoError
from ..plugins import Raised, attempt, load
from ..requirements import installed_version
from . import doctor_device, install_plan
from .table import print_table

PACKAGES = ("grpo-core", "torch", "transformers", "tokenizers", "safetensors", "pluggy", "pydantic", "numpy")
OPTIONAL = ("ninja", "gguf", "reasoning-gym", "math-verify", "pyarrow", "tensorboard", "wandb")
LOW_DISK = 2 * 2**30


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo doctor`."""
    parser.add_argument("--device", default="", metavar="NAME",
                        help="what this device needs of the host, with what is missing")  # fmt: skip
    parser.add_argument("--matrix", action="store_true", help="sets of versions that were tested, by device")
    parser.add_argument("--install-plan", action="store_true",
                        help="the commands that install a tested row of --device")  # fmt: skip
    parser.add_argument("--row", default="", help="row of --matrix; the first unless given")
    parser.add_argument(
        "--machine", choices=install_plan.MACHINES, help="processor of the host to install on"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the findings; returns 1 when something is broken, or the device of `--device` cannot be used."""
    if (args.row or args.machine) and not args.install_plan:
        raise ConfigError(
            f"{'--row' if args.row else '--machine'} says nothing without --install-plan",
            why="rows and processors matter to an installation alone",
            fix="add --install-plan, or take it away",
        )
    catalogue = load()
    if args.install_plan:
        return _run_install_plan(args, catalogue)
    if args.matrix:
        table = doctor_device.matrix(catalogue, args.device)
        if args.json:
            print(json.dumps(doctor_device.matrix_json(table), indent=1))
        else:
            doctor_device.print_matrix(table)
        return 0
    if args.device:
        content = doctor_device.examine_device(args.device, catalogue)
        if args.json:
            print(json.dumps(content, indent=1))
        else:
            doctor_device.print_device(content)
        return 0 if content["usable"] else 1
    return _run_host(args, catalogue)


def _run_install_plan(args: argparse.Namespace, catalogue: Catalogue) -> int:
    if not args.device:
        raise ConfigError(
            "--install-plan needs a device",
            why="each device has rows of its own",
            fix=f"add --device, one of {', '.join(doctor_device.matrix(catalogue)) or 'none has rows'}",
        )
    [(device, rows)] = doctor_device.matrix(catalogue, args.device).items()
    row = pick_row(rows, args.row, device)
    machine = args.machine or install_plan.this_machine()
    if args.json:
        print(json.dumps(install_plan.plan_json(row, device, machine), indent=1))
    else:
        print(install_plan.script(row, device, machine), end="")
    return 0


def _run_host(args: argparse.Namespace, catalogue: Catalogue) -> int:
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
    print("\nwhat a device needs of this host, with what is missing: grpo doctor --device NAME")


def examine(catalogue: Catalogue) -> dict[str, Any]:
    """Versions, system, devices, problems and hints as plain data."""
    versions = {name: installed_version(name) for name in (*PACKAGES, *OPTIONAL)}
    devices = _devices(catalogue)
    torch = _torch()
    problems = _problems(catalogue, versions)
    if isinstance(torch, Raised):
        problems.append(_problem("torch cannot be imported", str(torch), "install torch again"))
    else:
        problems += [problem for problem in [autoload_problem()] if problem]
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
