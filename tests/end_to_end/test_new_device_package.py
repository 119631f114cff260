"""What `grpo new-plugin device` writes, installed from wheels in an environment with nothing else of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from built_wheels import PIP, ROOT, clean_environment, run_clean, wheel_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the environment `env` and the package `grpo-tern`, both wheels installed."""
    folder = tmp_path_factory.mktemp("road")
    bin_ = clean_environment(folder / "env")
    install = ("python", *PIP, "install", "--no-index", "--find-links", folder / "dist")
    wheel_of(ROOT, folder / "dist")
    run_clean(*install, "grpo-core", cwd=folder, bin_=bin_)
    said = run_clean("python", "-c", "import grpo_core; print(grpo_core.__file__)", cwd=folder, bin_=bin_)
    assert said.startswith(str(folder / "env"))
    assert "tern" not in run_clean("grpo", "plugins", cwd=folder, bin_=bin_)
    run_clean("grpo", "new-plugin", "device", "tern", cwd=folder, bin_=bin_)
    wheel_of(folder / "grpo-tern", folder / "dist")
    run_clean(*install, "grpo-tern", cwd=folder, bin_=bin_)
    return folder


def grpo(place: Path, *words: str | Path) -> str:
    return run_clean("grpo", *words, cwd=place, bin_=place / "env" / "bin")


def test_the_plugin_and_its_device_are_listed(place: Path) -> None:
    shown = json.loads(grpo(place, "plugins", "--json"))
    assert shown["failures"] == []
    (row,) = [row for row in shown["plugins"] if row["id"] == "tern"]
    assert (row["distribution"], row["version"]) == ("grpo-tern", "0.1.0")
    assert "no chip: a stand-in on the host's processor" in grpo(place, "doctor")


def test_a_run_is_planned_and_trained_on_it(place: Path, tiny_recipe: Path) -> None:
    plan = json.loads(grpo(place, "plan", tiny_recipe, "device=tern", "--json"))
    chosen = {row["op"]: row["chosen"] for row in plan["choices"]}
    assert chosen["attention.varlen"] == "tern:plain"
    said = grpo(place, "train", tiny_recipe, "device=tern", "train.steps=1")
    assert "step 1/1" in said and "tern (a stand-in)" in said
    plan = json.loads(grpo(place, "plan", tiny_recipe, "--json"))
    assert "tern:" not in json.dumps([row["chosen"] for row in plan["choices"]]), "the processor is no tern"


def test_its_own_tests_pass_and_with_them_levels_0_to_2(place: Path) -> None:
    said = run_clean(
        "python", "-P", "-m", "pytest", "-q", cwd=place / "grpo-tern", bin_=place / "env" / "bin"
    )
    assert "3 passed" in said
