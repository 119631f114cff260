"""Wheels built from source folders, and environments that hold what was installed from wheels alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "--quiet")


def run(*words: str | Path, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A process that has `site` before everything that is installed."""
    path = os.environ.get("PYTHONPATH", "")
    if site is not None:
        path = os.pathsep.join([str(site), path]).rstrip(os.pathsep)
    return _run(words, cwd, {**os.environ, "PYTHONPATH": path})


def run_clean(*words: str | Path, cwd: Path, bin_: Path) -> str:
    """The output of a command that must succeed in an environment, nothing of this one passed on."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_"))
    }
    kept["PATH"] = os.pathsep.join([str(bin_), kept["PATH"]])
    done = _run((bin_ / words[0], *words[1:]), cwd, kept)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wheel_of(source: Path, place: Path) -> Path:
    """Built with the hatchling that is installed: nothing is downloaded."""
    before = set(place.glob("*.whl"))
    done = run(
        sys.executable, *PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir",
        place, source, cwd=place.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = set(place.glob("*.whl")) - before
    return wheel


def clean_environment(folder: Path) -> Path:
    """A new virtual environment; returns its `bin`.

    It sees the packages of this one, torch among them, except grpo-core and whatever is installed as
    editable: those have to come from wheels.
    """
    made = _run((sys.executable, "-m", "venv", "--without-pip", folder), folder.parent, dict(os.environ))
    assert made.returncode == 0, made.stderr
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("grpo", "_grpo", "__")) and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "bin"


def _run(
    words: tuple[str | Path, ...], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=600, check=False,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
