"""`grpo doctor --device`, `--matrix` and `--install-plan`, for a device with a doctor and for a plain one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo_core.cli import doctor as command
from grpo_core.cli.main import main
from grpo_core.devices.doctor import Check, Row, Step
from grpo_core.devices.torch_device import TorchDevice
from grpo_core.hookspecs import hookimpl
from grpo_core.plugins import load

STEPS = (
    Step(why="By hand: the driver."),
    Step(command='pip install -c "$constraints" acme', why="the backend", machine="aarch64"),
    Step(command='pip install -c "$constraints" acme-x86', why="the backend", machine="x86_64"),
    Step(command="acme-turbo", why="faster", optional=True),
)
ROW = Row(
    name="acme-2", versions={"acme": "2.0", "torch": "2.9.0"}, proof="audited", basis="read by an auditor",
    constraints="grpo_core/py.typed", steps=STEPS,
)  # fmt: skip
FINE = Check(part="driver", status="ok", why="version 5")
BAD = Check(part="runtime", status="missing", why="no runtime", fix="install acme-runtime")
HINT = Check(part="ulimit", status="advice", why="low", fix="ulimit -n 65536")


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds the device "acme" with a doctor; its checks can be set."""
    doctor: Any = ModuleType("acme_doctor")
    doctor.found = (FINE, HINT)
    doctor.checks = lambda: doctor.found
    doctor.rows = lambda: (ROW,)
    monkeypatch.setitem(sys.modules, "acme_doctor", doctor)

    class Plugin:
        @hookimpl
        def grpo_devices(self) -> Any:
            yield TorchDevice(
                name="acme", type="acme", vendor="", visible_env="", comm="", doctor="acme_doctor"
            )

    monkeypatch.setattr(command, "load", lambda: load(extra={"acme": Plugin()}))
    return doctor


def test_what_a_device_lacks_with_its_fix_and_exit_code(acme: Any, capsys: Any) -> None:
    assert main(["doctor", "--device", "acme"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("acme (acme, plugin acme): found\n") and "fix: ulimit -n 65536" in out
    assert out.endswith("0 to mend, 1 to think about\n")
    acme.found = (FINE, BAD)
    assert main(["doctor", "--device", "acme"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "missing  runtime  no runtime" in lines
    assert lines[lines.index("missing  runtime  no runtime") + 1].strip() == "fix: install acme-runtime"
    assert main(["doctor", "--device", "acme", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["usable"] is False and [one["status"] for one in said["checks"]] == ["ok", "missing"]


def test_no_word_of_a_fix_is_cut_however_narrow_the_terminal(
    acme: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/usr/lib/aarch64-linux-gnu/a-library-with-a-long-name.so.2"
    acme.found = (Check(part="jemalloc", status="advice", why="no", fix=f"export LD_PRELOAD={path}"),)
    assert main(["doctor", "--device", "acme"]) == 0
    assert f"LD_PRELOAD={path}" in capsys.readouterr().out


def test_a_terminal_shows_the_same_text(acme: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor", "--device", "acme"]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["doctor", "--device", "acme"]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert [line.rstrip() for line in shown.splitlines()] == plain.splitlines()


def test_a_device_without_checks_says_what_its_probe_says(capsys: Any) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "ok       device  the host's processor" in capsys.readouterr().out


def test_an_unknown_device_is_a_users_mistake(capsys: Any) -> None:
    assert main(["doctor", "--device", "ascent"]) == 2
    assert "did you mean 'ascend'" in capsys.readouterr().err


def test_the_matrix_tells_proof_and_basis(acme: Any, capsys: Any) -> None:
    assert main(["doctor", "--matrix", "--device", "acme"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == ["row", "proof", "acme", "torch"]
    assert "acme-2  audited  2.0   2.9.0" in out and "acme-2: read by an auditor" in out
    assert main(["doctor", "--matrix", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["acme"] == [
        {"row": "acme-2", "versions": ROW.versions, "proof": "audited", "basis": ROW.basis}
    ]
    assert "cpu" not in table
    assert main(["doctor", "--matrix", "--device", "cpu"]) == 0
    assert "names no tested rows" in capsys.readouterr().out


def test_an_install_plan_is_a_script_for_one_processor(acme: Any, capsys: Any, tmp_path: Path) -> None:
    assert main(["doctor", "--device", "acme", "--install-plan", "--machine", "aarch64"]) == 0
    text = capsys.readouterr().out
    assert "acme-x86" not in text and "# $ acme-turbo" in text and "# 1. By hand: the driver." in text
    log = tmp_path / "log"
    for name in ("pip", "grpo"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["sh", "-e"], input=text, text=True, capture_output=True, timeout=60, check=False,
        env={"PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pip, grpo = log.read_text().splitlines()
    given = pip.split()[3]
    assert pip == f"pip install -c {given} acme" and grpo == "grpo doctor --device acme"
    assert Path(given).name == "py.typed" and Path(given).is_file()


def test_an_install_plan_as_json(acme: Any, capsys: Any) -> None:
    words = [
        "doctor",
        "--device",
        "acme",
        "--install-plan",
        "--machine",
        "x86_64",
        "--row",
        "acme-2",
        "--json",
    ]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["row"], said["machine"]) == ("acme-2", "x86_64")
    commands = [step["command"] for step in said["steps"]]
    assert commands == ["", 'pip install -c "$constraints" acme-x86', "acme-turbo"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--install-plan"], "--install-plan needs a device"),
        (["--device", "cpu", "--install-plan"], "device 'cpu' has no tested rows"),
        (["--device", "acme", "--install-plan", "--row", "acme-3"], "did you mean 'acme-2'"),
        (["--device", "acme", "--row", "acme-2"], "--row says nothing without --install-plan"),
        (["--machine", "aarch64"], "--machine says nothing without --install-plan"),
    ],
)
def test_what_does_not_go_together(acme: Any, capsys: Any, words: list[str], error: str) -> None:
    assert main(["doctor", *words]) == 2
    assert error in capsys.readouterr().err
