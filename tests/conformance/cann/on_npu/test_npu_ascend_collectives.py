"""The plugin's collectives between two processes, over torch_npu's own process group."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RANK = Path(__file__).with_name("ascend_rank.py")


LONGEST = 60.0
"""Seconds; HCCL itself waits for 120 until a rank connects."""


def ranks(folder: Path, *how: str) -> tuple[Path, list[int], list[str]]:
    """Where two ranks wrote what they found, how they ended, and what they said."""
    out, store = folder / "found", f"file://{folder}/store"
    processes = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(rank), store, str(out), *how], stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=900)[1].decode(errors="replace") for process in processes]
    return out, [process.returncode for process in processes], said


def test_a_peer_that_died_before_the_first_call_is_missed_at_once(tmp_path: Path) -> None:
    out, codes, said = ranks(tmp_path, "bereft")
    assert codes == [0, -signal.SIGKILL], said
    found = json.loads(Path(f"{out}.0").read_text())
    assert "all_reduce failed: a peer did not answer or is gone" in found["raised"]
    assert found["seconds"] < LONGEST


def test_two_ranks_over_hccl(tmp_path: Path) -> None:
    out, codes, said = ranks(tmp_path)
    assert codes == [0, 0], said
    found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    for row in found:
        for name in ("float32", "bfloat16", "float16", "int64", "int32", "float64"):
            assert row[f"sum torch.{name}"] == [[3, 9], [6, 12]], name
        assert row["avg"] == [1.0, -1.5] and row["max"] == [1.5, -1.0] and row["min"] == [0.5, -2.0]
        assert row["avg float64"] == pytest.approx([0.6], abs=1e-15), "not reduced in float32"
        assert row["gather"] == [False, True] and row["broadcast"] == [[1, 255]]
        assert row["gather float64"] == [0.1, 1.1]
        assert row["objects"] == [{"rank": 0}, {"rank": 1}]
        assert row["native float64"], "HCCL has no float64, and says so"
    assert [row["scatter"] for row in found] == [[0.0, 1.5], [3.0, 4.5]]
    assert [row["uneven"] for row in found] == [[0.0, 1.0], [2.0, 10.0, 11.0, 12.0]]
    assert [row["alone"] for row in found] == [[1.0], [2.0]]
