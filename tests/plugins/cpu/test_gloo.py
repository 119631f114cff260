"""Collectives over gloo between real processes, against the formulas of each collective."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grpo_core.errors import ConfigError, GrpoError
from grpo_cpu.collectives import Gloo

WORLD = 3
TIMEOUT = 60.0
"""Seconds for processes that are only slow to start on a busy machine."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def worker(
    target: Callable[[Gloo, int], object], rank: int, world: int, store: str, timeout: float, out: str
) -> None:
    torch.set_num_threads(1)
    comm = Gloo()
    comm.init(rank=rank, world=world, store=store, timeout=timeout)
    result = target(comm, rank)
    Path(f"{out}.{rank}").write_bytes(pickle.dumps(result))
    comm.close()
    comm.close()


def start(target: Callable[[Gloo, int], object], world: int, store: str, timeout: float, out: Path) -> list:
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=worker, args=(target, rank, world, store, timeout, str(out)), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def results(processes: list, out: Path) -> list:
    for process in processes:
        process.join(2 * TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [pickle.loads(Path(f"{out}.{rank}").read_bytes()) for rank in range(len(processes))]


def rows_of(rank: int) -> torch.Tensor:
    return torch.arange(6.0).view(6, 1) + 10 * rank


def everything(comm: Gloo, rank: int) -> dict[str, object]:
    """One call of each collective, on the world and on a group of ranks 0 and 2."""
    got: dict[str, object] = {}
    world = comm.group([0, 1, 2])
    for op in ("sum", "max", "min", "avg"):
        x = rows_of(rank).t()  # not contiguous
        world.all_reduce(x, op=op)
        got[op] = x
    for dtype in (torch.bfloat16, torch.float64, torch.int64):
        x = (torch.tensor([1 + rank / 128, 256.0]) * (1 + (dtype == torch.int64))).to(dtype)
        world.all_reduce(x, op="sum")
        got[str(dtype)] = x
    got["gather"] = world.all_gather(rows_of(rank)[:2])
    got["scatter"] = world.reduce_scatter(rows_of(rank), op="avg")
    x = rows_of(rank)
    world.broadcast(x, src=2)
    got["broadcast"] = x
    # counts[i][j]: rows that rank i sends to rank j; zeros, and a rank that sends nothing at all.
    counts = [[1, 0, 3], [0, 0, 0], [2, 4, 0]]
    sends = counts[rank]
    got["all_to_all"] = world.all_to_all(
        rows_of(rank)[: sum(sends)], send_counts=sends, recv_counts=[row[rank] for row in counts]
    )
    got["objects"] = world.gather_objects({"rank": rank, "text": "x" * rank})
    world.barrier()
    if rank != 1:
        pair = comm.group([0, 2])
        x = torch.tensor([float(rank)])
        pair.broadcast(x, src=0)
        got["pair"] = (pair.rank, pair.size, x, pair.all_gather(torch.tensor([rank])))
    return got


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("gloo")
    return results(
        start(everything, WORLD, f"file://{folder}/store", TIMEOUT, folder / "out"), folder / "out"
    )


def test_all_reduce_of_every_op(gathered: list[dict[str, torch.Tensor]]) -> None:
    x = torch.stack([rows_of(rank).t() for rank in range(WORLD)])
    for got in gathered:
        assert torch.equal(got["sum"], x.sum(0))
        assert torch.equal(got["avg"], x.mean(0))
        assert torch.equal(got["max"], x.amax(0))
        assert torch.equal(got["min"], x.amin(0))


def test_bfloat16_is_summed_in_float32_and_rounded_once(gathered: list[dict[str, torch.Tensor]]) -> None:
    # 1 + 1.0078125 + 1.015625 = 3.0234375: rounded to a multiple of 2^-6 once, it is 3.03125 (a tie, to
    # even); bfloat16 sums along the way would give 3.015625 or 3.03125 by order of ranks.
    exact = torch.tensor([1.0, 1 + 1 / 128, 1 + 2 / 128]).sum()
    for got in gathered:
        assert got["torch.bfloat16"][0] == exact.bfloat16()
        assert got["torch.bfloat16"][1] == 768
        assert got["torch.float64"].tolist() == [3 + 3 / 128, 768.0]
        assert got["torch.int64"].tolist() == [6, 1536]


def test_gather_scatter_broadcast(gathered: list[dict[str, torch.Tensor]]) -> None:
    mean = torch.stack([rows_of(rank) for rank in range(WORLD)]).mean(0)
    for rank, got in enumerate(gathered):
        assert torch.equal(got["gather"], torch.cat([rows_of(r)[:2] for r in range(WORLD)]))
        assert torch.equal(got["scatter"], mean[2 * rank : 2 * rank + 2])
        assert torch.equal(got["broadcast"], rows_of(2))


def test_uneven_all_to_all_with_zero_counts(gathered: list[dict[str, torch.Tensor]]) -> None:
    a, c = rows_of(0), rows_of(2)
    assert torch.equal(gathered[0]["all_to_all"], torch.cat([a[:1], c[:2]]))
    assert torch.equal(gathered[1]["all_to_all"], c[2:6])
    assert torch.equal(gathered[2]["all_to_all"], a[1:4])


def test_objects_and_a_group_of_some_ranks(gathered: list[dict[str, object]]) -> None:
    expected = [{"rank": rank, "text": "x" * rank} for rank in range(WORLD)]
    assert all(got["objects"] == expected for got in gathered)
    for rank, place in ((0, 0), (2, 1)):
        index, size, x, everyone = gathered[rank]["pair"]
        assert (index, size, x.item(), everyone.tolist()) == (place, 2, 0.0, [0, 2])
    assert "pair" not in gathered[1]


def meet_a_dead_peer(comm: Gloo, rank: int) -> tuple[str, float]:
    group = comm.group([0, 1])
    if rank == 1:
        os._exit(0)
    began = time.monotonic()
    try:
        for _ in range(3):
            group.all_reduce(torch.ones(1 << 20), op="sum")
    except GrpoError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


def meet_a_silent_peer(comm: Gloo, rank: int) -> tuple[str, float]:
    group = comm.group([0, 1])
    began = time.monotonic()
    if rank == 1:
        time.sleep(SILENCE)
        return "", 0.0
    try:
        group.barrier()
    except GrpoError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


SILENCE = 30.0
PATIENCE = 10.0


@pytest.mark.slow
@pytest.mark.parametrize("peer", [meet_a_dead_peer, meet_a_silent_peer])
def test_a_peer_that_is_gone_raises_within_the_timeout(
    peer: Callable[[Gloo, int], object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    processes = start(peer, 2, f"tcp://127.0.0.1:{free_port()}", PATIENCE, out)
    processes[0].join(TIMEOUT)
    try:
        assert processes[0].exitcode == 0
        message, seconds = pickle.loads(Path(f"{out}.0").read_bytes())
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert "a peer did not answer or is gone" in message
    assert "fix:" in message
    # The timeout itself, and some seconds for a busy machine.
    assert seconds < PATIENCE + 8


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_a_peer_that_never_comes_raises_within_the_timeout(rank: int, kind: str, tmp_path: Path) -> None:
    store = f"tcp://127.0.0.1:{free_port()}" if kind == "tcp" else f"file://{tmp_path}/store"
    comm = Gloo()
    began = time.monotonic()
    with pytest.raises(GrpoError, match="joining through"):
        comm.init(rank=rank, world=2, store=store, timeout=1.0)
    assert time.monotonic() - began < 10
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "store", ["", "tcp://host", "tcp://:80", "file://store", "file:///no/such/folder/x", "etcd://a:1"]
)
def test_a_store_that_makes_no_sense_is_refused(store: str) -> None:
    with pytest.raises(ConfigError, match="rendezvous"):
        Gloo().init(rank=0, world=2, store=store, timeout=1.0)


def test_a_rank_outside_of_the_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot join"):
        Gloo().init(rank=2, world=2, store=f"file://{tmp_path}/store", timeout=1.0)


def test_one_process_alone_and_wrong_calls(tmp_path: Path) -> None:
    comm = Gloo()
    comm.init(rank=0, world=1, store=f"file://{tmp_path}/store", timeout=10.0)
    try:
        group = comm.group([0])
        with pytest.raises(ConfigError, match="already"):
            Gloo().init(rank=0, world=1, store=f"file://{tmp_path}/store", timeout=1.0)
        for ranks in ([1], [0, 0], [], [0, 1], [1, 0]):
            with pytest.raises(ValueError, match="group"):
                comm.group(ranks)
        with pytest.raises(ValueError, match="reduce op"):
            group.all_reduce(torch.ones(1), op="product")
        with pytest.raises(ValueError, match="average"):
            group.all_reduce(torch.ones(1, dtype=torch.int64), op="avg")
        with pytest.raises(ValueError, match="no rank"):
            group.broadcast(torch.ones(1), src=1)
        with pytest.raises(ValueError, match="counts"):
            group.all_to_all(torch.ones(2), send_counts=[1], recv_counts=[1])
        x = torch.ones(2)
        group.all_reduce(x, op="avg")
        assert x.tolist() == [1.0, 1.0]
        assert group.gather_objects("a") == ["a"]
    finally:
        comm.close()
