"""What a torch-npu wheel asks of CANN: symbols that its libraries leave open, names that they look up."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOOKED_UP = re.compile(rb"\0((?:acl|Hccl|Hcom|rt[A-Z]|mspti|mstx|Msprof)[A-Za-z0-9_]*)(?=\0)")
"""Functions that torch_npu finds by name while it runs, as they lie in its libraries."""
SYSTEM = re.compile(r"(lib(c|m|gcc_s|pthread|stdc\+\+|dl|rt|gomp)\.so|ld-linux)")
"""Libraries that every Linux has."""
FOREIGN = re.compile(r"_?Py|_ITM|__gmon|__cxa_|_ZN8pybind11|__tls_get_addr")
"""Symbols of the interpreter and the compiler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What stand-ins have to provide."""

    functions: frozenset[str]
    libraries: frozenset[str]


def libraries_of(package: Path) -> list[Path]:
    """The shared libraries of an installed torch_npu that run without a compiler of graphs."""
    found = [*package.glob("lib/*.so"), *package.glob("_C*.so"), *package.glob("dynamo/**/*.so")]
    return sorted(found)


def wanted(package: Path, torch_libraries: Path) -> Wanted:
    """What the libraries of `package` need and neither they nor torch nor the system have."""
    own = libraries_of(package)
    friends = [*own, *torch_libraries.glob("*.so*")]
    there = {name.partition("@")[0] for name in _symbols(friends, "--defined-only")}
    # The system's libraries give their symbols versions ("memcpy@GLIBC_2.14"), CANN's do not.
    open_ends = {name for name in _symbols(own, "--undefined-only") if "@" not in name}
    functions = {name for name in open_ends - there if not FOREIGN.match(name)}
    for path in own:
        functions |= {name.decode() for name in LOOKED_UP.findall(path.read_bytes())}
    operators = {name for name in functions if name.startswith("aclnn")}
    functions |= {name + "GetWorkspaceSize" for name in operators if not name.endswith("GetWorkspaceSize")}
    present = {path.name for path in friends}
    needed = {name for name in _needed(own) if name not in present and not SYSTEM.match(name)}
    return Wanted(functions=frozenset(functions), libraries=frozenset(needed))


def _symbols(paths: Iterable[Path], which: str) -> Iterator[str]:
    """Dynamic symbols, without those that may stay open."""
    for path in paths:
        for line in _run("nm", "-D", which, str(path)).splitlines():
            parts = line.split()
            if len(parts) >= 2 and parts[-2] not in "wv":
                yield parts[-1]


def _needed(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield from re.findall(r"\(NEEDED\).*\[(.*?)\]", _run("readelf", "-d", str(path)))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
