"""Builds the simulated device's C++ backend, once per machine and torch version.

It is compiled on first use into `~/.cache/grpo-core/sim/<key>/sim.so`, where the key is a hash of the
sources, the flags and torch's version.
"""

from __future__ import annotations

from pathlib import Path

from grpo_core import builds

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(".cache") / "grpo-core" / "sim"
"""Below the home directory."""
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra")
DEVICE = builds.Product(name="the simulated device")


def build(cache: Path, sources: Path = SOURCES) -> Path:
    """Path of the compiled library in `cache`. Raises `PluginError` when it cannot be compiled."""
    return builds.once(cache / key(sources) / "sim.so", lambda scratch: _compile(scratch, sources), DEVICE)


def key(sources: Path = SOURCES) -> str:
    """What the library depends on, as a short hash."""
    import torch

    return builds.fingerprint((torch.__version__, FLAGS), sorted(sources.iterdir()))


def _compile(scratch: Path, sources: Path) -> Path:
    return builds.torch_library(scratch, sources, builds.program(DEVICE, "g++", "c++"), FLAGS, DEVICE)
