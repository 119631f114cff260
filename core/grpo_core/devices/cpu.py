"""The CPU as a device: probed from the operating system, torch imported only where it computes."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..impl import DeviceInfo
from .base import Probe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile")
"""x86 flags of /proc/cpuinfo that become features under their own names."""
DTYPES = frozenset({"bfloat16", "float16", "float32", "float64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """Implements `Device` on the host's processors."""

    name: str = "cpu"
    type: str = "cpu"
    vendor: str = ""
    visible_env: str = ""
    comm: str = "gloo"

    def probe(self) -> Probe:
        """Always found. Features: FLAGS, "arm_bf16", "fast_bf16" and "compiler"."""
        product, flags = read_cpuinfo(CPUINFO)
        info = DeviceInfo(
            type=self.type,
            vendor=self.vendor,
            name=product or platform.processor() or platform.machine(),
            memory_bytes=memory_bytes(),
            dtypes=DTYPES,
            features=features(flags),
        )
        return Probe(found=True, reason="the host's processor", info=info)

    def open(self, index: int) -> torch.device:
        """torch's CPU device; the index has no meaning here."""
        import torch

        return torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def seed(self, seed: int) -> None:
        """Seed torch's global generator; keeps the low 64 bits."""
        import torch

        torch.manual_seed(seed & (2**64 - 1))

    def rng_state(self) -> Tensor:
        """uint8 state of torch's global generator."""
        import torch

        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        """Continue from `rng_state`."""
        import torch

        torch.set_rng_state(state)


def read_cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    """Product name and flags from /proc/cpuinfo; both empty where there is none."""
    product, flags = "", frozenset[str]()
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return product, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not product:
            product = value.strip()
        # "flags" on x86, "Features" on arm.
        if key.strip() in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return product, flags


def features(flags: frozenset[str]) -> frozenset[str]:
    """Features from the processor's flags and a compiler on PATH."""
    found = {flag for flag in FLAGS if flag in flags}
    if "bf16" in flags:
        found.add("arm_bf16")
    if found & {"avx512_bf16", "amx_bf16", "arm_bf16"}:
        found.add("fast_bf16")
    if compiler():
        found.add("compiler")
    return frozenset(found)


def compiler() -> str:
    """Path of a C++ compiler, or the empty string."""
    return next((path for path in map(shutil.which, COMPILERS) if path), "")


def memory_bytes() -> int:
    """Memory of the host, or the control group's limit where that is lower; 0 when not known."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
    for path in CGROUP_LIMITS:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):
            continue
    return total
