"""Extras resolve from the registry that pip is configured with, for both processors, from wheels alone.

Where the registry does not answer, the test fails with what pip says.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from dry_run import MACHINES, resolve
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
TOGETHER = ("cuda", "math", "parquet", "tensorboard", "wandb", "megatron", "ray")
"""Extras that may be had in one environment: resolved at once, because each resolution takes a while."""
SOURCES = {"reasoning-gym"}
"""Of `quickstart`: it depends on pure Python packages that are published as sources alone."""
ELSEWHERE = {
    "quickstart": "installed for this test run; the rest of it is in `math`, or pure Python",
    "dev": "installed for this test run",
    "flash": "sources alone",
    "vllm": "a resolution of minutes over hundreds of packages; an environment of its own",
    "sglang": "the same",
}
"""Extras that are not resolved here, with why."""
pytestmark = pytest.mark.slow


def test_every_extra_is_resolved_or_says_why_not() -> None:
    assert set(EXTRAS) == {*TOGETHER, "ascend", *ELSEWHERE}
    rest = [item for item in map(Requirement, EXTRAS["quickstart"]) if item.name not in SOURCES]
    assert {item.name for item in rest} == {"gguf", "accelerate", "math-verify", "ninja"}


@pytest.mark.parametrize("machine", MACHINES)
def test_extras_of_one_environment_resolve(pip: Path, machine: str, tmp_path: Path) -> None:
    asked = [item for extra in TOGETHER for item in EXTRAS[extra]]
    rest = [item for item in EXTRAS["quickstart"] if Requirement(item).name not in SOURCES]
    found = resolve(pip, machine, [*PROJECT["dependencies"], *asked, *rest], tmp_path)
    assert {canonicalize_name(Requirement(item).name) for item in asked} <= set(found)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_ascend_extra_brings_the_torch_of_its_backend(pip: Path, machine: str, tmp_path: Path) -> None:
    found = resolve(pip, machine, [*PROJECT["dependencies"], *EXTRAS["ascend"]], tmp_path)
    torch, npu = (found[name]["version"] for name in ("torch", "torch-npu"))
    assert torch.partition("+")[0] == npu.partition(".post")[0]
    assert not {"vllm", "mindspeed", "triton-ascend", "apex"} & set(found)
