"""Collectives of the simulated device, by processes that really meet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_conformance.sim import build as building

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
SCRIPT = Path(__file__).with_name("sim_rank.py")
WORLD = 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three ranks got; the last one leaves before the others' last call."""
    building.build(Path.home() / building.CACHE)
    store = f"file://{tmp_path_factory.mktemp('store')}/store"
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(WORLD), store], stdout=subprocess.PIPE, text=True
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_every_collective_gives_what_it_should(ranks: list[dict[str, Any]]) -> None:
    sums = {"sum": [6.0, -6.0, 1.5], "max": [3.0, 0.0, 0.5], "min": [1.0, -4.0, 0.5], "avg": [2.0, -2.0, 0.5]}
    for rank, got in enumerate(ranks):
        for op, wanted in sums.items():
            assert got[f"{op} torch.float32"] == wanted and got[f"{op} torch.bfloat16"] == wanted
        assert got["strided"] == [[6.0, 0.0]] * 3
        assert got["all_gather"] == [0.0, 10.0, 1.0, 11.0, 2.0, 12.0]
        assert got["empty gather"] == [0, 3]
        assert got["reduce_scatter"] == [3.0 * (2 * rank), 3.0 * (2 * rank + 1)]
        assert got["broadcast"] == [7.0]
        assert got["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def test_rows_are_swapped_unevenly_and_none_at_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["all_to_all"] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert ranks[1]["all_to_all"] == []
    assert ranks[2]["all_to_all"] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert {got["on device"] for got in ranks} == {"sim"}


def test_a_part_of_the_ranks_is_a_group(ranks: list[dict[str, Any]]) -> None:
    assert [got.get("part") for got in ranks] == [None, [2.0], [2.0]]


def test_host_tensors_and_unknown_reductions_are_refused(ranks: list[dict[str, Any]]) -> None:
    for got in ranks:
        assert got["host refused"] and got["unknown op refused"]
        assert got["reduce_ops"] == ["max", "min", "sum"]


def test_a_peer_that_leaves_is_an_error_and_not_a_hang(ranks: list[dict[str, Any]]) -> None:
    assert [got.get("lost peer is told") for got in ranks] == [True, True, None]
