"""Compiles Triton kernels for GPUs that are not here, down to their machine code."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may have, by compute capability (CUDA C Programming Guide, table of
technical specifications)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the compilers say of a kernel."""

    shared: int
    registers: int
    stack: int
    """Bytes of local memory a thread: registers that were spilled."""
    ptx: str


def compiled(
    kernel: Any, types: str, constants: Mapping[str, Any], *, capability: int, warps: int, stages: int,
    folder: Path,
) -> Compiled:  # fmt: skip
    """A kernel for arguments of `types` in order, all addresses and integers multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    plain = [name for name in names if name not in constants]
    signature = dict(zip(plain, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or signature[name] == "i32"
    }
    source = ASTSource(kernel, {name: signature[name] for name in names}, dict(constants), aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    registers, stack = _resources(made.asm["cubin"], folder)
    return Compiled(shared=made.metadata.shared, registers=registers, stack=stack, ptx=made.asm["ptx"])


def _resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, by the disassembler that Triton brings along."""
    from triton.backends import nvidia

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])
