"""What pip would install on a machine that is not here: wheels alone, of which it reads the metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MACHINES = ("x86_64", "aarch64")
SHIM = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""pip takes --platform for the tags of wheels, but reads markers (platform_machine) off the host."""
Found = Mapping[str, Mapping[str, Any]]
"""Core metadata by distribution, as pip's report has it."""


def install_pip(folder: Path) -> Path:
    """A folder with a pip whose dry run downloads no wheels."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "pip>=26,<27"],
        capture_output=True, text=True, timeout=600, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def environment(**more: str) -> dict[str, str]:
    """This one's, without the constraint that CI keeps torch by."""
    return {**{key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}, **more}


def tags(machine: str) -> list[str]:
    """Linux with glibc 2.28 or later; pip does not add the older tags by itself."""
    older = [f"manylinux2014_{machine}", *(["manylinux1_x86_64"] if machine == "x86_64" else [])]
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)), *older]


def resolve(
    pip: Path, machine: str, requirements: list[str], folder: Path, *words: str, python: str = "3.11"
) -> Found:
    """What is found for `requirements`, with more `words` of pip's. `folder` may hold a report already."""
    target = [word for tag in tags(machine) for word in ("--platform", tag)]
    target += ["--python-version", python, "--target", str(folder)]
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", SHIM, machine, "install", "--dry-run", "--ignore-installed", "--quiet",
         "--use-feature=fast-deps", "--only-binary=:all:", "--report", report, *target, *words,
         *requirements],
        capture_output=True, text=True, timeout=900, check=False, env=environment(PYTHONPATH=str(pip)),
    )  # fmt: skip
    assert done.returncode == 0, f"pip for {machine}: {done.stderr}"
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {canonicalize_name(item["name"]): item for item in items}


def stand_in(metadata: Mapping[str, Any], machine: str, version: str, tag: str, folder: Path) -> None:
    """A wheel of nothing in `folder`, with the name of `metadata` and its dependencies on `machine`."""
    name = f"{metadata['name']}-{version}"
    there = {"platform_machine": machine, "platform_system": "Linux", "sys_platform": "linux", "extra": ""}
    needed = [item for item in map(Requirement, metadata["requires_dist"])
              if item.marker is None or item.marker.evaluate(there)]  # fmt: skip
    lines = ["Metadata-Version: 2.1", f"Name: {metadata['name']}", f"Version: {version}"]
    lines += [f"Requires-Dist: {item.name}{item.specifier}" for item in needed]
    with zipfile.ZipFile(folder / f"{name}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", "\n".join([*lines, ""]))
        wheel.writestr(f"{name}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
