"""Requirements held against installed metadata."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from grpo_core import requirements
from grpo_core.requirements import installed_version, required_name, requirement_problem, unmet


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distribution acme-rt 2.1.dev3+g12 on the path."""
    info = tmp_path / "acme_rt-2.1.dev3+g12.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rt\nVersion: 2.1.dev3+g12\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    requirements.forget()
    yield  # type: ignore[misc]
    requirements.forget()


@pytest.mark.usefixtures("acme")
@pytest.mark.parametrize(
    ("requirement", "reason"),
    [
        ("acme-rt", None),
        ("Acme_RT>=2", None),
        ("acme-rt[all]>=2,<3", None),
        ("acme-rt>=2.1", "needs acme-rt>=2.1, 2.1.dev3+g12 is installed"),
        ("acme-rt<2", "needs acme-rt<2, 2.1.dev3+g12 is installed"),
        ("acme-rt-absent>=1", "needs acme-rt-absent>=1, not installed"),
        ("acme-rt-absent; python_version < '3'", None),
        (
            "acme-rt-absent; python_version >= '3'",
            "needs acme-rt-absent; python_version >= '3', not installed",
        ),
    ],
)
def test_a_requirement_holds_or_says_why_not(requirement: str, reason: str | None) -> None:
    assert unmet(requirement) == reason


def test_metadata_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: asked.append(name) or real(name))
    requirements.forget()
    for _ in range(3):
        assert unmet("pluggy>=1") is None and unmet("pluggy>=1.1") is None
        assert installed_version("pluggy") == real("pluggy")
    assert asked == ["pluggy"]


def test_text_that_is_no_requirement_says_why() -> None:
    assert requirement_problem("torch>=2") is None
    assert "torch two" not in str(requirement_problem("torch>=2"))
    assert requirement_problem("torch two")
    assert "cannot be read" in str(unmet("torch two"))


@pytest.mark.parametrize(
    ("requirement", "name"), [("acme-rt[extra]>=2,!=2.1; sys_platform == 'linux'", "acme-rt"), ("!", None)]
)
def test_the_distribution_of_a_requirement(requirement: str, name: str | None) -> None:
    assert required_name(requirement) == name
