"""Every argument of every contract has a row for every vendor, and no row is about anything else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo_core.ops.contract import CONTRACTS

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("plugins/*/grpo_*/arguments.json"))
OPS = [op for op in CONTRACTS if not op.startswith("engine.")]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate_tables", ROOT / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_vendors_have_a_table() -> None:
    assert [json.loads(path.read_text())["vendor"] for path in FILES] == ["Ascend", "CUDA"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_the_rows_are_the_arguments_of_the_contracts(path: Path, generate: Any) -> None:
    told = json.loads(path.read_text())["ops"]
    assert list(told) and set(told) == set(OPS)
    for op in OPS:
        wanted = {"", *generate.arguments_of(CONTRACTS[op])}
        assert set(told[op]) == wanted, (
            f"{op}: missing {wanted - set(told[op])}, of no use {told[op].keys() - wanted}"
        )
        assert all(text.strip() for text in told[op].values()), f"{op}: a row says nothing"


def test_arguments_of_what_a_class_gives_out_count_too(generate: Any) -> None:
    assert {"write.k_TKD", "fork.prefix", "__init__.spec"} <= set(
        generate.arguments_of(CONTRACTS["attention.cache"])
    )
    assert "all_to_all.send_counts" in generate.arguments_of(CONTRACTS["comm.collectives"])


def test_calls_that_a_row_names_are_calls_that_the_plugin_makes() -> None:
    """A row that went stale would name a vendor's op that nothing calls."""
    import re

    for path in FILES:
        sources = "".join(file.read_text() for file in path.parent.glob("*.py"))
        for op, rows in json.loads(path.read_text())["ops"].items():
            first = rows[""].split(";")[0]
            for name in re.findall(r"`(npu_\w+|flash_attn_\w+|Process\w+)", first):
                assert name in sources, f"{path.parent.name}: {op} names {name}"


def test_every_contract_is_at_version_1_and_serves_version_0() -> None:
    assert {(row.version, row.oldest) for row in CONTRACTS.values()} == {(1, 0)}
    assert all(set(row.hints) <= set(row.added) for row in CONTRACTS.values())
