"""The command that runs others with the simulated CANN, and the hook in their processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_conformance.cann import __main__ as command
from grpo_conformance.cann.build import Packages
from grpo_conformance.cann.limits import LIMITS
from grpo_conformance.cann.run import HOOK, Machine, environment
from grpo_core.errors import ConfigError


def test_help_tells_the_limits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(limit.split()) in said for limit in LIMITS)


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch-npu is installed")
def test_without_torch_npu_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cann", "--", "true"])
    assert command.shown() == 2
    said = capsys.readouterr().err
    assert "torch_npu is not installed" in said and "make ascend-sim" in said


@pytest.mark.parametrize("machine", [Machine(devices=0), Machine(devices=65), Machine(memory_bytes=10)])
def test_machines_that_cannot_be_are_refused(machine: Machine) -> None:
    with pytest.raises(ConfigError):
        environment(machine)


def in_process(folder: Path, code: str) -> str:
    words = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HOOK), str(folder)])}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=words
    ).stdout


def test_the_hook_leaves_other_packages_and_other_hooks_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('mine')\n")
    (tmp_path / "plain.py").write_text("WORD = 'there'\n")
    assert in_process(tmp_path, "import plain; print(plain.WORD)") == "mine\nthere\n"


def test_the_numeric_layer_comes_right_after_the_import_of_torch_npu(tmp_path: Path) -> None:
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text("print('vendor')\n")
    code = """
import sys, types
layer = types.ModuleType("grpo_conformance.cann.numeric")
layer.install = lambda: print("numbers")
sys.modules[layer.__name__] = layer
import grpo_conformance.cann
grpo_conformance.cann.numeric = layer
import torch_npu, torch_npu
print(torch_npu.__name__, torch_npu.__spec__.origin.endswith("__init__.py"))
"""
    assert in_process(tmp_path, code) == "vendor\nnumbers\ntorch_npu True\n"


def test_symbols_that_only_the_vendor_needs_are_found(tmp_path: Path) -> None:
    """A library that leaves one function open and looks another up by name."""
    from grpo_conformance.cann.symbols import wanted

    package = tmp_path / "torch_npu"
    (package / "lib").mkdir(parents=True)
    source = tmp_path / "vendor.c"
    source.write_text(
        'int aclrtOpenEnd(void); extern int puts(const char*);\n'
        'const char* names[] = {"aclnnLooked", "unrelated"};\n'
        'int call(void) { return aclrtOpenEnd() + puts(names[0]); }\n'
    )  # fmt: skip
    library = package / "lib" / "libvendor.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    packages = Packages(torch=tmp_path / "torch", torch_npu=package)
    found = wanted(packages.torch_npu, packages.torch / "lib")
    assert found.functions == {"aclrtOpenEnd", "aclnnLooked", "aclnnLookedGetWorkspaceSize"}
