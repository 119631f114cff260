"""Builds the stand-ins for CANN's libraries, once for each machine and torch-npu.

They go to `~/.cache/grpo-core/cann/<key>/lib`, where the key is a hash of our sources and of what is
installed.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from grpo_core import builds
from grpo_core.requirements import installed_version

from .symbols import libraries_of, wanted

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(".cache") / "grpo-core" / "cann"
"""Below the home directory."""
CANN = "libascendcl.so"
"""Holds everything; the others are empty and lead to it."""
LOADED = ("libopapi.so", "libhccl.so", "libhcomm.so", "libmsprofiler.so", "libruntime.so", "libcust_opapi.so")
"""Libraries that torch_npu opens by name while it runs."""
NUMERIC = "libgrpo_cann_numeric.so"
C_FLAGS = ("-std=gnu17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter")
CPP_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall")
SIMULATED = builds.Product(name="the simulated CANN")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packages:
    """Where the two packages are installed; nothing is imported."""

    torch: Path
    torch_npu: Path


def installed() -> Packages:
    """The installed torch and torch-npu. Raises `PluginError` where one is missing."""
    found = {}
    for name in ("torch", "torch_npu"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SIMULATED.error(
                why=f"package {name} is not installed",
                fix="pip install torch==2.13.0 torch-npu==2.13.0; `make ascend-sim` does it in an "
                "environment of its own",
            )
        found[name] = Path(next(iter(spec.submodule_search_locations)))
    return Packages(**found)


def build(cache: Path, packages: Packages, sources: Path = SOURCES) -> Path:
    """The folder of the libraries. Raises `PluginError` when they cannot be compiled."""
    libraries = cache / key(packages, sources) / "lib"
    return builds.once(libraries, lambda scratch: _compile(scratch, packages, sources), SIMULATED)


def key(packages: Packages, sources: Path = SOURCES) -> str:
    """What the libraries depend on, as a short hash."""
    versions = [installed_version(name) for name in ("torch", "torch-npu")]
    sizes = [(path.name, path.stat().st_size) for path in libraries_of(packages.torch_npu)]
    facts = (versions, sizes, C_FLAGS, CPP_FLAGS, LOADED)
    return builds.fingerprint(facts, [*sorted(sources.iterdir()), Path(__file__)])


def _compile(scratch: Path, packages: Packages, sources: Path) -> Path:
    out = scratch / "lib"
    out.mkdir()
    want = wanted(packages.torch_npu, packages.torch / "lib")
    rest = scratch / "rest.c"
    rest.write_text(stand_ins(want.functions - defined(sources)), encoding="utf-8")
    empty = scratch / "empty.c"
    empty.write_text("const int grpo_cann_empty = 0;\n", encoding="utf-8")
    with ThreadPoolExecutor(max_workers=2) as pool:
        numeric = pool.submit(_run, _numeric(out, packages, sources))
        runtime(out, sources, rest)
        for name in sorted({*want.libraries, *LOADED} - {CANN}):
            link = [
                f"-Wl,-soname,{name}",
                "-Wl,--no-as-needed",
                "-Wl,-rpath,$ORIGIN",
                f"-L{out}",
                "-lascendcl",
            ]
            _run([_program("gcc", "cc"), "-shared", "-fPIC", str(empty), "-o", str(out / name), *link])
        numeric.result()
    return out


def runtime(out: Path, sources: Path = SOURCES, *more: Path) -> Path:
    """Our C sources, and more of them, as one library in `out`. Raises `PluginError` as `build` does."""
    units = [*sorted(sources.glob("*.c")), *more]
    _run([
        _program("gcc", "cc"), *C_FLAGS, "-shared", f"-I{sources}", *map(str, units), f"-Wl,-soname,{CANN}",
        "-o", str(out / CANN), "-lpthread",
    ])  # fmt: skip
    return out / CANN


def _numeric(out: Path, packages: Packages, sources: Path) -> list[str]:
    include = packages.torch / "include"
    folders = [f"-isystem{include}", f"-isystem{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    libraries = [f"-L{packages.torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [
        _program("g++", "c++"), *CPP_FLAGS, "-shared", *folders, str(sources / "numeric.cpp"), *libraries,
        "-o", str(out / NUMERIC),
    ]  # fmt: skip


DEFINITION = re.compile(r"^(?!static)[a-z][\w ]*[ *]+(\w+)\([^;]*\{", re.MULTILINE)


def defined(sources: Path) -> set[str]:
    """Functions that our C sources have."""
    return {name for path in sources.glob("*.c") for name in DEFINITION.findall(path.read_text("utf-8"))}


def stand_ins(names: Iterable[str]) -> str:
    """C source of functions for the rest: operators are refused, calls that only set something up succeed."""
    lines = ['#include "cann.h"', "#include <stdlib.h>"]
    return "\n".join([*lines, *(_stand_in(name) for name in sorted(names)), ""])


REFUSED = re.compile(
    r"aclop(Compile|Execute)|aclmdl(RI|Execute|Load)|aclrt(Ipc|Mem(Export|Import|SetPid)|MemcpyBatch)"
    r"|aclStressDetect|Hccl|Hcom"
)
"""What cannot be left out without a wrong result."""


def _stand_in(name: str) -> str:
    if name.startswith("aclnn"):
        text = f"{name.removesuffix('GetWorkspaceSize')} is not computed"
        return f'int {name}(void) {{ return cann_refuse(kNoKernel, "{text}"); }}'
    if name.startswith(("Hccl", "Hcom")):
        return f'int {name}(void) {{ return cann_refuse(5, "{name} is not simulated"); }}'
    if REFUSED.match(name):
        return f'int {name}(void) {{ return cann_refuse(kUnsupported, "{name} is not simulated"); }}'
    if name.startswith(("aclCreate", "aclprofCreate")):
        return f"void* {name}(void) {{ return calloc(1, 64); }}"
    return f'long {name}(void) {{ cann_record("{name}"); return 0; }}'


def _program(*names: str) -> str:
    return builds.program(SIMULATED, *names)


def _run(command: Sequence[str]) -> None:
    builds.run(command, SIMULATED)
