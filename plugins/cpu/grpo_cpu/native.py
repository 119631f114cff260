"""Builds and loads the C++ op pack, once per machine.

The pack is compiled on first use with the system's C++ compiler into
`~/.cache/grpo-core/native/<key>/pack.so`, where the key is a hash of the sources, the flags, torch's version
and the CPU's features. Each source file is compiled by its own process, without ninja.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_core import builds
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
COMPILERS = ("g++", "c++")
PACK = builds.Product(
    name="the C++ op pack of the CPU plugin", instead=", or pin ops of another offer (see `grpo plan`)"
)


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
    return next(filter(None, map(shutil.which, COMPILERS)), None)


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
    library = cache / key(sources, flags) / "pack.so"
    return builds.once(library, lambda scratch: _compile(scratch, sources, flags), PACK)


def key(sources: Path, flags: Sequence[str]) -> str:
    """What the library depends on, as a short hash."""
    import torch

    facts = (torch.__version__, sorted(cpu_flags()), tuple(flags))
    return builds.fingerprint(facts, sorted(sources.iterdir()))


def _compile(scratch: Path, sources: Path, flags: Sequence[str]) -> Path:
    return builds.torch_library(scratch, sources, builds.program(PACK, *COMPILERS), flags, PACK)
