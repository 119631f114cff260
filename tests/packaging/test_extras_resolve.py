"""Extras resolve from the registry that pip is configured with, for both processors, from wheels alone.

pip reads the metadata of wheels, not the wheels. Where the registry does not answer, the test fails with what
pip says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
MACHINES = ("x86_64", "aarch64")
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
SHIM = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""pip takes --platform for the tags of wheels, but reads markers (platform_machine) off the host."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pip whose dry run downloads no wheels."""
    folder = tmp_path_factory.mktemp("pip")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "pip>=26,<27"],
        capture_output=True, text=True, timeout=600, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def environment(**more: str) -> dict[str, str]:
    """This one's, without the constraint that CI keeps torch by."""
    return {**{key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}, **more}


def tags(machine: str) -> list[str]:
    """Linux with glibc 2.28 or later; pip does not add the older tags by itself."""
    older = [f"manylinux2014_{machine}", *(["manylinux1_x86_64"] if machine == "x86_64" else [])]
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)), *older]


def resolve(pip: Path, machine: str, requirements: list[str], report: Path, *words: str) -> dict[str, str]:
    """Versions by distribution."""
    target = [word for tag in tags(machine) for word in ("--platform", tag)]
    target += ["--python-version", "3.11", "--target", str(report.parent)]
    done = subprocess.run(
        [sys.executable, "-c", SHIM, machine, "install", "--dry-run", "--ignore-installed", "--quiet",
         "--use-feature=fast-deps", "--only-binary=:all:", "--report", report, *target, *words,
         *requirements],
        capture_output=True, text=True, timeout=900, check=False, env=environment(PYTHONPATH=str(pip)),
    )  # fmt: skip
    assert done.returncode == 0, f"pip for {machine}: {done.stderr}"
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {canonicalize_name(item["name"]): item["version"] for item in items}


def test_every_extra_is_resolved_or_says_why_not() -> None:
    assert set(EXTRAS) == {*TOGETHER, "ascend", *ELSEWHERE}
    rest = [item for item in map(Requirement, EXTRAS["quickstart"]) if item.name not in SOURCES]
    assert {item.name for item in rest} == {"gguf", "accelerate", "math-verify", "ninja"}


@pytest.mark.parametrize("machine", MACHINES)
def test_extras_of_one_environment_resolve(pip: Path, machine: str, tmp_path: Path) -> None:
    asked = [item for extra in TOGETHER for item in EXTRAS[extra]]
    rest = [item for item in EXTRAS["quickstart"] if Requirement(item).name not in SOURCES]
    found = resolve(pip, machine, [*PROJECT["dependencies"], *asked, *rest], tmp_path / "report.json")
    assert {canonicalize_name(Requirement(item).name) for item in asked} <= set(found)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_ascend_extra_brings_the_torch_of_its_backend(pip: Path, machine: str, tmp_path: Path) -> None:
    asked = [*PROJECT["dependencies"], *EXTRAS["ascend"]]
    found = resolve(pip, machine, asked, tmp_path / "report.json")
    torch, npu = found["torch"].partition("+")[0], found["torch-npu"].partition(".post")[0]
    assert torch == npu and not {"vllm", "mindspeed", "triton-ascend", "apex"} & set(found)


def test_a_row_resolves_under_its_constraints(pip: Path, tmp_path: Path) -> None:
    """On aarch64, where PyPI has all of it; x86_64 takes torch from PyTorch's own index."""
    constraints = ROOT / "plugins/ascend/grpo_ascend/constraints/torch-2.10.txt"
    asked = [*PROJECT["dependencies"], *EXTRAS["ascend"]]
    found = resolve(pip, "aarch64", asked, tmp_path / "report.json", "-c", str(constraints))
    assert (found["torch"], found["torch-npu"]) == ("2.10.0", "2.10.0.post4")
