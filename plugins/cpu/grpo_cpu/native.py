"""Builds and loads the C++ op pack, once per machine.

The pack is compiled on first use with the system's C++ compiler into
`~/.cache/grpo-core/native/<key>/pack.so`, where the key is a hash of the sources, the flags, torch's version
and the CPU's features. Processes that come at the same time wait for the one that builds; a library appears
under its name only when it is whole. Each source file is compiled by its own process, without ninja.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_core.errors import PluginError

from . import malloc

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(".cache") / "grpo-core" / "native"
"""Below the home directory."""
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    # gcc 12 takes its own _mm512_undefined_* for uninitialised variables.
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
LITTLE_ROOM = 128 << 20
"""Bytes of free results that are kept: paging them in again takes half of a tiny model's step."""
TIMEOUT = 900.0
"""Seconds that one compilation may take."""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature names of the first CPU as Linux spells them; empty where they cannot be read."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, ()))


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("c++")


@functools.cache
def load() -> Any:
    """The namespace `torch.ops.grpo_cpu`, built first where needed. Raises `PluginError`."""
    import torch

    library = build(Path.home() / CACHE)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise PluginError(
            "the C++ op pack of the CPU plugin cannot be loaded",
            why=str(error).splitlines()[0],
            fix=f"delete {library.parent} so that it is built again, or pin the reference ops",
        ) from error
    malloc.on_release(functools.partial(torch.ops.grpo_cpu.release_room, LITTLE_ROOM))
    return torch.ops.grpo_cpu


def build(cache: Path, sources: Path = SOURCES, extra: Sequence[str] = ()) -> Path:
    """Path of the compiled library in `cache`. Raises `PluginError` when it cannot be compiled."""
    flags = (*FLAGS, *extra)
    folder = cache / key(sources, flags)
    library = folder / "pack.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not library.exists():
                _compile(sources, flags, library)
    except OSError as error:
        raise PluginError(
            "the C++ op pack of the CPU plugin cannot be built",
            why=f"{folder}: {error.strerror or error}",
            fix="make the folder writable, or pin ops of another offer (see `grpo plan`)",
        ) from error
    return library


def key(sources: Path, flags: Sequence[str]) -> str:
    """What the library depends on, as a short hash."""
    import torch

    digest = hashlib.sha256(repr((torch.__version__, sorted(cpu_flags()), tuple(flags))).encode())
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when its process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(sources: Path, flags: Sequence[str], library: Path) -> None:
    import torch
    from torch.utils.cpp_extension import include_paths

    program = compiler()
    if program is None:
        raise PluginError(
            "the C++ op pack of the CPU plugin cannot be built",
            why="no C++ compiler (g++ or c++) is on PATH",
            fix="install one (for example the package g++), or pin ops of another offer",
        )
    print(f"grpo: compiling the CPU op pack into {library.parent} (once, under a minute)", file=sys.stderr)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    include = [f"-isystem{path}" for path in include_paths()]
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        units = sorted(sources.glob("*.cpp"), key=lambda path: -path.stat().st_size)
        objects = [Path(scratch) / f"{unit.stem}.o" for unit in units]
        commands = [
            [program, *flags, abi, *include, "-c", str(unit), "-o", str(out)]
            for unit, out in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        whole = Path(scratch) / "pack.so"
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        _run([program, "-shared", "-fopenmp", *flags, *map(str, objects), *libraries, "-o", str(whole)])
        whole.rename(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise PluginError(
            "the C++ op pack of the CPU plugin cannot be built",
            why=f"the compiler did not finish within {TIMEOUT:.0f} s",
            fix="try again on a less busy machine, or pin ops of another offer",
        ) from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[
            -1:
        ]
        raise PluginError(
            "the C++ op pack of the CPU plugin cannot be built",
            why=f"{' '.join(command[:1])} failed: {' | '.join(errors[:3]) or f'exit code {done.returncode}'}",
            fix="install g++ 11 or newer, or pin ops of another offer (see `grpo plan`)",
        )
