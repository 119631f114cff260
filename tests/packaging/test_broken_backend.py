"""A package that torch loads along with itself and that cannot be loaded: torch-npu without CANN is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_core.devices.autoload import SWITCH, first_cause

pytestmark = pytest.mark.slow
BACKEND = """
def _autoload():
    raise ImportError("libdead.so: cannot open shared object file: No such file or directory")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution torch-dead 1.0, whose backend raises while it is loaded."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "torch_dead.py").write_text(BACKEND)
    facts = folder / "torch_dead-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-dead\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[torch.backends]\ntorch_dead = torch_dead:_autoload\n")
    return folder


def run(site: Path, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != SWITCH}
    path = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=600, check=False, cwd=cwd,
        env={**environment, "PYTHONPATH": path},
    )  # fmt: skip


def grpo(site: Path, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = run(site, "-m", "grpo_core.cli.main", *words, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_the_backend_is_as_broken_as_torch_npu_without_cann(site: Path, tmp_path: Path) -> None:
    done = run(site, "-c", "import torch", cwd=tmp_path)
    assert done.returncode == 1 and "Failed to load the backend extension: torch_dead" in done.stderr
    assert first_cause(done.stderr).startswith("ImportError: libdead.so: cannot open")


def test_plugins_and_plan_do_not_notice(site: Path, tmp_path: Path, tiny_recipe: Path) -> None:
    done = grpo(site, "plugins", cwd=tmp_path)
    assert done.returncode == 0 and "ascend" in done.stdout
    for device in ("cpu", "ascend"):
        done = grpo(site, "plan", tiny_recipe, f"device={device}", cwd=tmp_path)
        assert done.returncode == 0 and "attention.varlen" in done.stdout, done.stderr


def test_the_doctor_tells_what_it_does_to_other_programs(site: Path, tmp_path: Path) -> None:
    done = grpo(site, "doctor", cwd=tmp_path)
    assert done.returncode == 1 and "1 problem(s)" in done.stdout
    assert "problem: `import torch` fails because torch loads torch-dead 1.0 along with it" in done.stdout
    assert "libdead.so: cannot open" in done.stdout and f"export {SWITCH}=0" in done.stdout


def test_training_on_another_device_goes_on(site: Path, tmp_path: Path, tiny_recipe: Path) -> None:
    done = grpo(site, "train", tiny_recipe, "train.steps=1", cwd=tmp_path)
    assert done.returncode == 0 and "step 1/1" in done.stdout, done.stderr
