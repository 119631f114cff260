"""Tables: text as it is, on a terminal and elsewhere."""

from __future__ import annotations

import sys

import pytest

from grpo_core.cli.table import print_table

ROWS = [["a.b", "[bold]x[/bold]"], ["longer", "{1, 2}"]]


def test_plain_columns_are_aligned_without_trailing_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["op", "why"], ROWS, title="plan")
    assert capsys.readouterr().out == "plan\nop      why\na.b     [bold]x[/bold]\nlonger  {1, 2}\n"


def test_a_terminal_shows_brackets_and_not_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(["op", "why"], ROWS)
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out and "{1, 2}" in out


def test_a_table_without_rows_shows_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["op", "why"], [])
    assert capsys.readouterr().out == "op  why\n"
