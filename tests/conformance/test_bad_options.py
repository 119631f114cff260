"""Options of `grpo conformance` that cannot be right are told before any case runs, in three lines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from grpo_core.cli.main import main


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["conformance", *words]) == 2
    printed = capsys.readouterr()
    assert "INTERNALERROR" not in printed.out + printed.err and "passed" not in printed.out
    lines = printed.err.strip().splitlines()
    assert len(lines) == 3 and lines[1].startswith("  why: ") and lines[2].startswith("  fix: ")
    return lines[0]


def test_a_bad_file_of_known_failures_was_an_internal_error_of_pytest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "known.toml"
    bad.write_text("not toml")
    assert "is not a file of known failures" in told(capsys, "cpu", "--quick", "--known", str(bad))


@pytest.mark.parametrize("option", ["--json", "--html", "--junit"])
@pytest.mark.parametrize("device", [("cpu", "--quick"), ("--mutants", "levels")])
def test_a_run_without_a_place_for_its_report_does_not_begin(
    option: str, device: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path / "missing" / "out", tmp_path):
        assert "cannot be written" in told(capsys, *device, option, str(place))


def test_a_key_that_cannot_sign_lost_the_report_of_a_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen")
    assert "cannot be signed" in told(capsys, "cpu", "--quick", "--sign", str(tmp_path / "no key"))
