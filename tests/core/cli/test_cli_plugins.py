"""`grpo plugins` and `grpo doctor`."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from plan_helpers import offer, offering, plugin

from grpo_core.cli import doctor
from grpo_core.cli import plugins as listing
from grpo_core.cli.main import main
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plugins import load


@pytest.fixture
def with_plugins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds in-memory plugins to what the commands load."""

    def add(**extra: object) -> None:
        for module in (listing, doctor):
            monkeypatch.setattr(module, "load", lambda: load(extra=extra))

    return add


ACME = offering(
    offer(device="acme", rank=80),
    offer(name="plain", device="*"),
    offer(name="absent", device="acme", rank=90, requires=("acme-rt-absent>=2",)),
)


def test_plugins_lists_distribution_hooks_and_what_is_brought(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert (
        "grpo-core 0.1.0" in lines["core"] and "device:cpu" in lines["core"] and "attention" in lines["core"]
    )
    assert "model:qwen2" in lines["models"]


def test_the_matrix_shows_devices_that_are_not_here(
    with_plugins: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with_plugins(acme=ACME)
    assert main(["plugins", "--json"]) == 0
    matrix = json.loads(capsys.readouterr().out)["matrix"]
    assert list(matrix) == list(CONTRACTS)
    assert matrix["attention.varlen"]["acme"] == [
        "acme:absent (needs acme-rt-absent>=2, not installed)", "acme:fast",
    ]  # fmt: skip
    assert "acme:plain" in matrix["attention.varlen"]["*"]
    assert main(["plugins", "--matrix"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:2] == ["op", "*"] and "acme" in out.splitlines()[0]
    assert len([line for line in out.splitlines() if line.split(" ")[0] in CONTRACTS]) == len(CONTRACTS)


def test_a_failure_is_shown_with_its_fix_and_exit_code_1(
    with_plugins: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with_plugins(acme=plugin(attention=lambda: 1 // 0))
    assert main(["plugins"]) == 1
    out = capsys.readouterr().out
    assert "failed: plugin 'acme' (in-memory), grpo_attention: ZeroDivisionError" in out
    assert "fix: update in-memory, or set plugins_off: [acme]" in out
    assert main(["plugins", "--json"]) == 1
    [failure] = json.loads(capsys.readouterr().out)["failures"]
    assert failure["plugin"] == "acme" and "1 // 0" in failure["trace"]


def test_doctor_finds_a_sound_machine_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["problems"] == []
    assert said["versions"]["torch"] and said["system"]["torch threads"] >= 1
    # The simulated device is there for whoever asks for it.
    assert [row["name"] for row in said["devices"] if row["found"]] == ["cpu", "sim"]
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("0 problem(s)\n")


def test_doctor_shows_what_is_broken_and_its_fix(
    with_plugins: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def register(registry: Any) -> None:
        registry.reward("gone", "acme_rewards_absent:score")

    with_plugins(acme=plugin(register=register), broken=SimpleNamespace(a=1))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: plugin 'broken' (in-memory), register: it implements no hook" in out
    assert "problem: reward 'gone' of plugin 'acme' cannot be imported from acme_rewards_absent:score" in out
    assert out.endswith("2 problem(s)\n")


def test_doctor_hints_at_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "compiler", lambda: "")
    assert main(["doctor"]) == 0
    assert "hint: no C++ compiler" in capsys.readouterr().out
