"""`grpo new-plugin`: what it writes, and the names and folders that it refuses."""

from __future__ import annotations

import ast
import datetime
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from grpo_conformance.cli import WAYS
from grpo_conformance.known import read_known
from grpo_core.cli import main as cli
from grpo_core.cli import new_plugin
from grpo_core.cli.new_plugin import KINDS
from grpo_core.cli.plugin_names import WORDS, check_device, fields_of
from grpo_core.devices.torch_device import TorchDevice
from grpo_core.errors import ConfigError
from grpo_core.plugins import load


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed for an error: three lines and exit code 2."""
    assert cli.main(["new-plugin", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(":")[0].strip() for line in said.err.splitlines()] == ["error", "why", "fix"]
    return said.err


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_package_is_whole_and_named_after_the_family(tmp_path: Path) -> None:
    assert cli.main(["new-plugin", "model", "my-llm"]) == 0
    folder = tmp_path / "grpo-my-llm"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "pyproject.toml", "README.md", ".gitignore", ".github/workflows/ci.yml", "grpo_my_llm/__init__.py",
        "grpo_my_llm/plugin.py", "grpo_my_llm/my_llm.py", "tests/test_my_llm.py",
    }  # fmt: skip
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["grpo.plugins"] == {"my-llm": "grpo_my_llm.plugin"}
    family = (folder / "grpo_my_llm" / "my_llm.py").read_text()
    assert 'architectures = ("MyLlmForCausalLM",)' in family and 'name = "my-llm"' in family
    assert [path for path in tmp_path.iterdir() if path != folder] == []


def test_the_package_of_a_device_has_its_parts(tmp_path: Path) -> None:
    assert cli.main(["new-plugin", "device", "my-chip"]) == 0
    folder = tmp_path / "grpo-my-chip"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "pyproject.toml", "README.md", ".gitignore", ".github/workflows/ci.yml", "known-failures.toml",
        "grpo_my_chip/__init__.py", "grpo_my_chip/plugin.py", "grpo_my_chip/device.py",
        "grpo_my_chip/attention.py", "tests/test_conformance.py",
    }  # fmt: skip
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["grpo.plugins"] == {"my-chip": "grpo_my_chip.plugin"}
    assert read_known(folder / "known-failures.toml", today=datetime.date(2026, 1, 1)) == ()


def test_the_known_failure_in_the_comment_is_one(tmp_path: Path) -> None:
    cli.main(["new-plugin", "device", "my-chip"])
    path = tmp_path / "grpo-my-chip" / "known-failures.toml"
    text = path.read_text().partition("#\n")[2]
    path.write_text("\n".join(line.removeprefix("# ") for line in text.splitlines()))
    (entry,) = read_known(path, today=datetime.date(2026, 1, 1))
    assert entry.matches("ops/attention.varlen/my-chip:plain/bfloat16/ragged")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_to_fill_in(kind: str, tmp_path: Path) -> None:
    cli.main(["new-plugin", kind, "my-own"])
    for path in (tmp_path / "grpo-my-own").rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert text.isascii() and text.endswith("\n")
            # GitHub's own ${{ }} is the only dollar.
            assert "$" not in text.replace("${{", "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x", "wwwwwwwwwwww-wwwwwwwwwww"])
def test_the_written_code_passes_the_linter_that_it_names(kind: str, name: str, tmp_path: Path) -> None:
    cli.main(["new-plugin", kind, name])
    ruff = Path(sys.executable).parent / "ruff"
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [ruff, *words, "--no-cache"], cwd=next(tmp_path.iterdir()), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def test_folder_and_architecture_can_be_given(tmp_path: Path) -> None:
    words = ["new-plugin", "model", "lm2", "--out", "deep/er", "--architecture", "InternLM2ForCausalLM"]
    assert cli.main(words) == 0
    text = (tmp_path / "deep" / "er" / "grpo_lm2" / "lm2.py").read_text()
    assert 'architectures = ("InternLM2ForCausalLM",)' in text


@pytest.mark.parametrize("name", ["import", "plugin", "none", "true", "json", "torch", "x2"])
def test_a_name_that_means_something_to_python_still_gives_code(name: str, tmp_path: Path) -> None:
    assert cli.main(["new-plugin", "model", name]) == 0
    modules = sorted((tmp_path / f"grpo-{name}").rglob("*.py"))
    assert len({path.name for path in modules}) == 4
    for path in modules:
        ast.parse(path.read_text())
        assert path.stem not in ("import", "None", "True")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("My_LLM", "my-llm"), ("9x", "take 'x'"), ("a--b", "a-b"), ("a b", "a-b"), ("../x", "take 'x'"),
        ("", "my-llm"), ("x" * 25, "x" * 24), ("core", "another name"),
        ("conformance", "another name"),
    ],
)  # fmt: skip
def test_a_bad_name_is_refused_with_a_good_one(
    name: str, fix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fix in refused(["model", name], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llama"], "by family 'llama' of plugin 'models'"),
        (["other", "--architecture", "Qwen3ForCausalLM"], "by family 'qwen3' of plugin 'models'"),
        (["cpu"], "a plugin 'cpu' is installed already"),
        (["other", "--architecture", "Not A Class"], "cannot be an architecture"),
    ],
)
def test_what_another_plugin_has_is_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(["model", *words], capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cpu"], "a plugin 'cpu' is installed already"),
        (["xpu"], "a device type of torch itself"),
        (["auto"], "take a name such as auto-chip"),
        (["null"], "cannot be a device's name"),
        (["verify"], "cannot be a device's name"),
        (["9x"], "take 'x'"),
        (["core"], "belongs to grpo-core itself"),
        (["mine", "--architecture", "LlamaForCausalLM"], "says nothing of a device"),
    ],
)
def test_a_device_needs_a_name_of_its_own(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(["device", *words], capsys)
    assert list(tmp_path.iterdir()) == []


def test_what_the_suite_takes_for_something_else_is_no_name() -> None:
    assert set(WAYS) <= set(WORDS)


def test_the_name_and_the_torch_type_of_a_device_are_taken() -> None:
    chip = TorchDevice(name="acme", type="acmetype", vendor="", visible_env="", comm="")
    found = replace(load(), devices={"acme": chip}, owners={"device:acme": "other"})
    for name in ("acme", "acmetype"):
        with pytest.raises(ConfigError, match=f"'{name}' is a device already"):
            check_device(name, found)
    check_device("acme-2", found)


def test_an_existing_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grpo-mine").mkdir()
    (tmp_path / "grpo-mine" / "thesis.txt").write_text("two years of work")
    assert "grpo-mine exists already" in refused(["model", "mine"], capsys)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "exists already" in refused(["model", "mine", "--out", "dangling"], capsys)
    assert (tmp_path / "grpo-mine" / "thesis.txt").read_text() == "two years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "grpo-mine"]


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(["model", "mine", "--out", "file/mine"], capsys)


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.txt": "common/init.py.tmpl", "b.txt": "absent.tmpl"}
    broken = new_plugin.Kind(help="", what="", files=files)
    monkeypatch.setattr(new_plugin, "KINDS", {"model": broken})
    assert cli.main(["new-plugin", "model", "mine"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_kind_is_argparses_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new-plugin", "car", "mine"]) == 2
    assert "choose from" in capsys.readouterr().err


def test_every_template_is_used_and_there() -> None:
    root = resources.files("grpo_core") / "templates"
    there = {f"{folder.name}/{path.name}" for folder in root.iterdir() for path in folder.iterdir()}
    assert there == {source for kind in KINDS.values() for source in kind.files.values()}


def test_fields_depend_on_the_name_only() -> None:
    fields = fields_of("my_llm-2")
    assert (fields["package"], fields["distribution"]) == ("grpo_my_llm_2", "grpo-my-llm-2")
    assert (fields["cls"], fields["architecture"]) == ("MyLlm2", "MyLlm2ForCausalLM")
