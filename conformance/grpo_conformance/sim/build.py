"""Builds the simulated device's C++ backend, once per machine and torch version.

It is compiled on first use into `~/.cache/grpo-core/sim/<key>/sim.so`, where the key is a hash of the
sources, the flags and torch's version. Processes that come at the same time wait for the one that builds; the
library appears under its name only when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grpo_core.errors import PluginError

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(".cache") / "grpo-core" / "sim"
"""Below the home directory."""
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra")
TIMEOUT = 900.0
"""Seconds that one compilation may take."""
WHAT = "the simulated device cannot be built"


def build(cache: Path, sources: Path = SOURCES) -> Path:
    """Path of the compiled library in `cache`. Raises `PluginError` when it cannot be compiled."""
    folder = cache / key(sources)
    library = folder / "sim.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            # The system lets go of it when the process dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(sources, library)
    except OSError as error:
        raise PluginError(
            WHAT, why=f"{folder}: {error.strerror or error}", fix="make the folder writable"
        ) from error
    return library


def key(sources: Path = SOURCES) -> str:
    """What the library depends on, as a short hash."""
    import torch

    digest = hashlib.sha256(repr((torch.__version__, FLAGS)).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def _compile(sources: Path, library: Path) -> None:
    import torch
    from torch.utils.cpp_extension import include_paths

    program = shutil.which("g++") or shutil.which("c++")
    if program is None:
        raise PluginError(
            WHAT,
            why="no C++ compiler (g++ or c++) is on PATH",
            fix="install one (for example the package g++)",
        )
    print(f"grpo: compiling the simulated device into {library.parent} (once, a minute)", file=sys.stderr)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [program, *FLAGS, abi, *(f"-isystem{path}" for path in include_paths())]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        units = sorted(sources.glob("*.cpp"), key=lambda path: -path.stat().st_size)
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in units]
        commands = [
            [*common, "-c", str(unit), "-o", str(out)] for unit, out in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        whole = Path(scratch) / "sim.so"
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([program, "-shared", *map(str, objects), *libraries, "-o", str(whole)])
        whole.rename(library)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise PluginError(
            WHAT,
            why=f"the compiler did not finish within {TIMEOUT:.0f} s",
            fix="try again on a less busy machine",
        ) from error
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line] or lines[-1:]
        raise PluginError(
            WHAT,
            why=f"{Path(command[0]).name} failed: {' | '.join(errors[:3]) or f'exit code {done.returncode}'}",
            fix="install g++ 11 or newer; the sources are written for torch 2.13",
        )
