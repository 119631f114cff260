"""The command line: quick, three lines for a mistake, and the right exit code."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core import plugins
from grpo_core.cli import main as cli
from grpo_core.errors import ConfigError
from grpo_core.plugins import CORE_COMMANDS

HEAVY = ("torch", "transformers", "tokenizers", "pydantic", "yaml", "rich", "numpy")


def grpo(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grpo_core.cli.main", *words], capture_output=True, text=True, timeout=120,
        check=False, env={**os.environ, **environment},
    )  # fmt: skip


def loaded_after(*words: str) -> set[str]:
    """Which of the heavy packages a command imports."""
    code = f"import sys; from grpo_core.cli.main import main; main({list(words)!r})\n" + (
        f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return set(done.stderr.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    assert loaded_after("--help") == set()
    assert loaded_after("plugins") == set()
    assert loaded_after("plugins", "--help") == set()


def test_help_is_quick() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert grpo("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # 150 ms is the promise on an idle machine (benchmarks/bench_plan.py measures it); a slow one gets
    # twice that. torch alone takes a second.
    assert min(seconds() for _ in range(5)) < 0.3


def test_help_lists_every_command() -> None:
    done = grpo("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in CORE_COMMANDS)
    assert grpo().stdout == done.stdout == grpo("-h").stdout


def test_the_names_closed_to_plugins_are_the_cores_commands() -> None:
    assert tuple(cli.COMMANDS) == CORE_COMMANDS


def test_version() -> None:
    assert grpo("--version").stdout == f"grpo-core {importlib.metadata.version('grpo-core')}\n"


def test_an_unknown_command_is_three_lines_and_exit_code_2() -> None:
    done = grpo("plon")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "error: there is no command 'plon' (did you mean 'plan'?)"
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "fix"]


def test_a_wrong_argument_is_argparses_exit_code_2() -> None:
    done = grpo("plugins", "--matricks")
    assert done.returncode == 2 and "unrecognized arguments: --matricks" in done.stderr


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `grpo plugins` run a function."""

    def put(run: Any) -> None:
        module = SimpleNamespace(configure=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "grpo_core.cli.plugins", module)  # type: ignore[arg-type]

    return put


def test_a_grpo_error_has_its_own_exit_code_and_a_traceback_only_with_debug(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: Any) -> int:
        raise ConfigError("no data", why="the file is empty", fix="fill it", exit_code=5)

    command(run)
    assert cli.main(["plugins"]) == 5
    assert capsys.readouterr().err == "error: no data\n  why: the file is empty\n  fix: fill it\n"
    assert cli.main(["plugins", "--debug"]) == 5
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("  fix: fill it\n")


def test_an_interrupt_is_130(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args: Any) -> int:
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["plugins"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(command: Any) -> None:
    command(lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plugins"])


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    line = f"{sys.executable} -m grpo_core.cli.main plugins --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


PLUGIN = """
from grpo_core.hookspecs import hookimpl

def configure(parser):
    parser.add_argument("word")

def run(args):
    print("tuned", args.word)
    return 7

@hookimpl
def grpo_commands(cli):
    cli.command("tune", "tune something", configure, run)
"""


def test_a_command_of_a_plugin_is_listed_and_run(tmp_path: Path) -> None:
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[grpo.plugins]\nacme = acme_commands\n")
    (tmp_path / "acme_commands.py").write_text(PLUGIN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    assert "tune something (plugin acme)" in grpo("--help", PYTHONPATH=path).stdout
    done = grpo("tune", "strings", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (7, "tuned strings\n")
    assert grpo("tune", PYTHONPATH=path).returncode == 2


def test_failed_plugins_are_mentioned_by_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    real = plugins.load
    monkeypatch.setattr(plugins, "load", lambda: real(extra={"acme": SimpleNamespace()}))
    assert cli.main(["--help"]) == 0
    assert "plugin failure(s): see `grpo plugins`" in capsys.readouterr().out
