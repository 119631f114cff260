"""The walls between core, plugins and vendors, where import-linter cannot see them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "core" / "grpo_core"
PACKAGES = [CORE, *sorted((ROOT / "plugins").glob("*/grpo_*")), ROOT / "conformance"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLUGINS: dict[str, str] = PYPROJECT["project"]["entry-points"]["grpo.plugins"]
VENDORS = ("torch_npu", "mindspeed", "vllm", "vllm_ascend", "sglang", "transformer_engine", "flash_attn",
           "megatron", "ray", "triton", "fla")  # fmt: skip
CHIP_WORDS = ("cuda", "npu", "nccl", "hccl")
MAX_FILE, MAX_FUNCTION = 500, 60


def sources(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(folder.rglob("*.py"))


def chip_words(tree: ast.AST) -> list[str]:
    """Literals and names that name a chip; docstrings and other bare strings are prose."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words = [word for word in CHIP_WORDS if word in node.value.lower().split(":")[0].split()]
            found += [f"{node.lineno}: literal {word!r}" for word in words]
        elif isinstance(node, ast.Attribute) and node.attr in CHIP_WORDS:
            found.append(f"{node.lineno}: attribute .{node.attr}")
        elif isinstance(node, ast.alias) and set(node.name.split(".")) & set(CHIP_WORDS):
            found.append(f"import of {node.name}")
    return found


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ('x = "cuda"', 1),
        ('x = f"cuda:{i}"', 1),
        ('x = "cuda:0"', 1),
        ("torch.cuda.synchronize()", 1),
        ("import torch.cuda", 1),
        ("from torch import cuda", 1),
        ('x.to("NPU")', 1),
        ('"""Keys are "cuda" and "npu"."""', 0),
        ("x = 'input'", 0),
    ],
)
def test_the_scan_for_chips_sees_them(code: str, count: int) -> None:
    assert len(chip_words(ast.parse(code))) == count


def test_core_names_no_chip() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources(CORE)
        for line in chip_words(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a clean interpreter after running `code`."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", PLUGINS.values())
def test_a_plugins_module_loads_no_torch_and_no_vendor(module: str) -> None:
    assert not loaded_after(f"import {module}") & {"torch", "transformers", *VENDORS}


def test_answering_all_hooks_loads_no_torch_and_no_vendor() -> None:
    loaded = loaded_after("from grpo_core.plugins import load; load()")
    assert not loaded & {"torch", "transformers", *VENDORS}


LIGHT = (
    "errors", "impl", "hookspecs", "registry", "types", "config", "catalogue", "plugins", "plan", "needs",
    "resolve", "planning", "signatures", "builtin", "ops.contract", "ops.attention", "ops.fused",
    "ops.memory", "ops.collectives", "devices.base", "devices.cpu", "devices.pick", "devices.torch_device",
    "cli.main", "cli.train", "cli.plan", "cli.plugins", "cli.doctor", "cli.report", "cli.new_plugin",
)  # fmt: skip


def test_what_planning_reads_loads_no_torch() -> None:
    loaded = loaded_after("\n".join(f"import grpo_core.{module}" for module in LIGHT))
    assert not loaded & {"torch", "transformers", *VENDORS}


def test_import_linter_keeps_its_contracts() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_import_linter_covers_every_bundled_package() -> None:
    linted = set(PYPROJECT["tool"]["importlinter"]["root_packages"])
    assert {module.split(".")[0] for module in PLUGINS.values()} <= linted


def test_no_file_is_longer_than_500_lines() -> None:
    files = [
        path for package in PACKAGES for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    long = {}
    for path in files:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE:
            long[str(path.relative_to(ROOT))] = lines
    assert not long


def test_no_function_is_longer_than_60_lines() -> None:
    long = {}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not long


def broad_excepts(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = (
                {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
                if node.type
                else {"all"}
            )
            if caught & {"all", "Exception", "BaseException"}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_broad_excepts_stand_only_where_foreign_code_is_run() -> None:
    found = [place.rpartition(":")[0] for path in sources(*PACKAGES) for place in broad_excepts(path)]
    # The loader asks plugins; a worker process of its own runs rewards and reports what they raise.
    assert sorted(found) == ["core/grpo_core/data/reward_protocol.py", "core/grpo_core/plugins.py"]
