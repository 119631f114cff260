"""torch_npu's own process group between two processes, over the simulated HCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import npu_rank
import pytest


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each rank printed, line by line."""
    store = tmp_path_factory.mktemp("store") / "store"
    script = Path(npu_rank.__file__)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(store)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        return [
            [json.loads(line) for line in rank.communicate(timeout=300)[0].splitlines()] for rank in ranks
        ]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_reductions_and_moves(told: list[list[Any]]) -> None:
    for rank, (said, *_) in enumerate(told):
        assert (said["sum"], said["max"], said["min"]) == ([3, 4], [2, 2], [1, 2])
        assert (said["prod"], said["avg"], said["half"]) == ([2, 4], [1.5, 2], [3, 4])
        assert said["uneven"] == ([0, 0, 1, 2], [1, 2, 3])[rank]
        assert said["neighbour"] == 1 - rank and said["listed"] == [[0, 0], [1, 1]]


def test_float64_is_refused_by_torch_npu_itself(told: list[list[Any]]) -> None:
    assert all("Unsupported data type at::kDouble" in said["float64"] for said, *_ in told)


def test_fully_sharded_training_is_that_of_the_whole_batch_on_a_cpu(told: list[list[Any]]) -> None:
    # The loss of the whole batch is the mean of both halves'; float32.
    whole = npu_rank.losses("cpu", slice(None), lambda model: None)
    halves = zip(told[0][0]["losses"], told[1][0]["losses"], strict=True)
    assert [sum(pair) / 2 for pair in halves] == pytest.approx(whole, rel=1e-5)


def test_a_rank_whose_peer_has_died_gets_an_error(told: list[list[Any]]) -> None:
    assert "error code is 21" in told[0][1]["alone"] and len(told[1]) == 1
