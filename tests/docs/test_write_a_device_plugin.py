"""docs/write-a-device-plugin.md, followed to the letter: its commands run and its changes apply."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from followed_page import follow

from grpo_conformance.sim import build as building


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated device needs a C++ compiler")
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="reports are signed with ssh-keygen")
def test_the_page_can_be_followed(tmp_path: Path, tiny_recipe: Path) -> None:
    building.build(Path.home() / building.CACHE)
    assert tiny_recipe == tmp_path / "run.yaml"
    here, ran = follow("write-a-device-plugin.md", tmp_path, "grpo-acme")
    assert ran == 13 and here == tmp_path / "grpo-acme"
    assert (here / "report.html").is_file() and (here / "report.xml").is_file()
    assert len(list((here / "dist").glob("grpo_acme-*.whl"))) == 1
