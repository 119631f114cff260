"""Each tested row of both chips resolves under its constraints, for both processors, from wheels alone.

What is published as sources alone is not built here: what it depends on is resolved in its place.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from dry_run import MACHINES, Found, resolve, stand_in
from packaging.version import Version

from grpo_ascend.rows import rows as ascend_rows
from grpo_core.devices.doctor import Row
from grpo_cuda.rows import BUILDERS
from grpo_cuda.rows import rows as cuda_rows

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PLAIN_TORCH_FROM = Version("2.12")
"""Releases of torch-npu before it pin "torch==X+cpu" on x86_64, which only PyTorch's own index has."""
OF_SOURCES = (
    "einops", "ninja", "packaging", "onnx", "onnxscript", "nvdlfw-inspect", "pydantic",
    "nvidia-cudnn-frontend>=1.29.0",
)  # fmt: skip
"""What flash-attn 2.8.3, causal-conv1d 1.7 and Transformer Engine 2.20 for torch depend on."""
pytestmark = pytest.mark.slow


def resolved(pip: Path, device: str, row: Row, machine: str, more: list[str], folder: Path) -> Found:
    folder.mkdir(exist_ok=True)
    constraints = ROOT / "plugins" / device / row.constraints
    asked = [*PROJECT["dependencies"], *EXTRAS[device], *more]
    found = resolve(pip, machine, asked, folder, "-c", str(constraints), "--find-links", str(folder))
    pinned = {name: version for name, version in row.versions.items() if name in found}
    assert pinned == {name: found[name]["version"].removesuffix("+cpu") for name in pinned}
    return found


@pytest.mark.parametrize("row", list(ascend_rows()), ids=lambda row: row.name)
def test_an_ascend_row_resolves(row: Row, pip: Path, tmp_path: Path) -> None:
    """On x86_64, where an older torch-npu wants a build of torch that PyPI lacks, with a stand-in of that
    build's name and of the dependencies of the one for aarch64, which has no CUDA either."""
    arm = resolved(pip, "ascend", row, "aarch64", [], tmp_path / "aarch64")
    assert {"torch", "torch-npu"} <= set(arm)
    folder = tmp_path / "x86_64"
    folder.mkdir()
    if Version(row.versions["torch"]) < PLAIN_TORCH_FROM:
        version, tag = f"{row.versions['torch']}+cpu", "cp311-cp311-manylinux_2_28_x86_64"
        stand_in(arm["torch"], "aarch64", version, tag, folder)
    intel = resolved(pip, "ascend", row, "x86_64", [], folder)
    assert intel["torch-npu"]["version"] == row.versions["torch-npu"]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("row", list(cuda_rows()), ids=lambda row: row.name)
def test_a_cuda_row_resolves(row: Row, machine: str, pip: Path, tmp_path: Path) -> None:
    major = row.versions["CUDA"].partition(".")[0]
    engine = f"transformer-engine[core-cu{major}]=={row.versions['transformer-engine']}"
    found = resolved(pip, "cuda", row, machine, [engine, *OF_SOURCES, *BUILDERS.split()], tmp_path)
    assert {*row.versions, f"transformer-engine-cu{major}"} - {"CUDA", "Python", "flash-attn"} <= set(found)
