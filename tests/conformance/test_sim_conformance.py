"""The suite's verdict on the healthy simulated device."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_conformance.sim import build as building

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["0-1", "memory"])
def test_the_healthy_device_passes(levels: str, tmp_path: Path) -> None:
    building.build(Path.home() / building.CACHE)
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "grpo_core.cli.main", "conformance", "sim", "--level", levels]
    done = subprocess.run(
        [*command, "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(report.read_text())
    assert said["target"]["simulated"] is True
    assert "sim: pass" in done.stdout
