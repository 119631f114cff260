"""Native code that is compiled once for a machine, into a cache under a hash of all that it depends on.

Processes that come at the same time wait for the one that builds; a result appears under its name only when
it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import PluginError

TIMEOUT = 900.0
"""Seconds that one command of a compiler may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is built, for what is said of it."""

    name: str
    """ "the simulated device"."""
    instead: str = ""
    """What else a user can do when it cannot be built, behind a comma: ", or pin ops of another offer"."""

    def error(self, *, why: str, fix: str) -> PluginError:
        """That it cannot be built."""
        return PluginError(f"{self.name} cannot be built", why=why, fix=fix + self.instead)


def fingerprint(facts: object, sources: Iterable[Path]) -> str:
    """A short hash of facts, by their repr, and of the names and contents of source files."""
    digest = hashlib.sha256(repr(facts).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def once(result: Path, make: Callable[[Path], Path], product: Product) -> Path:
    """`result`, a file or a folder; where it is not there yet, `make` builds it in an empty folder beside it
    and returns where. Raises PluginError for a folder that cannot be written, and what `make` raises."""
    folder = result.parent
    if result.exists():
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not result.exists():
                print(f"grpo: compiling {product.name} into {folder} (once, about a minute)", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    make(Path(scratch)).rename(result)
    except OSError as error:
        raise product.error(
            why=f"{folder}: {error.strerror or error}", fix="make the folder writable"
        ) from error
    return result


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system lets go of when its process dies, so that a killed one blocks nobody."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def program(product: Product, *names: str) -> str:
    """Path of the first compiler that is on PATH. Raises PluginError where none is."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise product.error(
            why=f"no compiler ({' or '.join(names)}) is on PATH",
            fix="install one (for example the package g++, which brings gcc)",
        )
    return found


def torch_library(
    scratch: Path, sources: Path, compiler: str, flags: Sequence[str], product: Product
) -> Path:
    """All C++ files of `sources`, each compiled by a process of its own, as one library that torch loads."""
    import torch
    from torch.utils.cpp_extension import include_paths

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = [compiler, *flags, abi, *(f"-isystem{path}" for path in include_paths())]
    units = sorted(sources.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    objects = [scratch / f"{unit.stem}.o" for unit in units]
    commands = [[*common, "-c", str(unit), "-o", str(out)] for unit, out in zip(units, objects, strict=True)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(lambda command: run(command, product), commands))
    whole = scratch / "whole.so"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    run([compiler, "-shared", *flags, *map(str, objects), *libraries, "-o", str(whole)], product)
    return whole


def run(command: Sequence[str], product: Product) -> None:
    """Run a compiler. Raises PluginError, with what it complains of, when it fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise product.error(
            why=f"the compiler did not finish within {TIMEOUT:.0f} s", fix="try again on a less busy machine"
        ) from error
    if done.returncode:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error" in line] or lines[-1:]
        raise product.error(
            why=f"{Path(command[0]).name} failed: {' | '.join(errors[:3]) or f'exit code {done.returncode}'}",
            fix="install g++ 11 or newer",
        )
