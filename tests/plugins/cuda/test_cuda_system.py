"""Memory of the CUDA plugin over host storages, its collectives over gloo between processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.errors import GrpoError
from grpo_cuda import collectives, memory


class Runtime:
    """`torch.cuda` as far as the plugin's memory uses it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.reserved = 0

    def memory_reserved(self) -> int:
        return self.reserved

    def memory_allocated(self) -> int:
        return 5

    def max_memory_allocated(self) -> int:
        return 9

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.asked.append(name)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made = Runtime()
    monkeypatch.setattr(memory.torch, "cuda", made)
    monkeypatch.setattr(memory, "_set_up", made.asked.append)
    for name in memory.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return made


def test_segments_are_expandable_unless_the_user_set_the_allocator_up(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.CudaMemory()
    assert runtime.asked == ["expandable_segments:True"]
    runtime.asked.clear()
    runtime.reserved = 1
    memory.CudaMemory()
    runtime.reserved = 0
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    memory.CudaMemory()
    assert not runtime.asked


@pytest.mark.parametrize("keep", ["host", "disk", "none"])
def test_sleep_frees_and_wake_brings_back(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    monkeypatch.setattr(memory, "PIECE", 40)
    held = memory.CudaMemory()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 11, generator=generator), torch.randn(3, generator=generator).bfloat16()
    view, empty = x[2:4], torch.empty(0)
    wanted = x.clone(), y.clone()
    held.hold("weights", [x, y, view, empty])
    held.hold("other", [torch.ones(2)])
    for _ in range(2):
        runtime.asked.clear()
        held.sleep("weights", keep=keep)
        assert runtime.asked == ["synchronize", "empty_cache"]
        assert x.untyped_storage().nbytes() == y.untyped_storage().nbytes() == 0
        stats = held.stats()
        assert stats.by_tag == {"weights": 0, "other": 8} and stats.asleep == {"weights": keep}
        held.sleep("weights", keep="none")
        held.wake("weights")
        held.wake("weights")
        zeros = keep == "none"
        assert torch.equal(x, torch.zeros_like(x) if zeros else wanted[0])
        assert torch.equal(y, torch.zeros_like(y) if zeros else wanted[1])
        assert torch.equal(view, x[2:4])
    stats = held.stats()
    assert (stats.allocated, stats.reserved, stats.peak) == (5, 0, 9)
    assert stats.by_tag["weights"] == 7 * 11 * 4 + 6
    assert held.tags.pinned_bytes() == (7 * 11 * 4 + 6 if keep == "host" else 0)


def test_refusals(runtime: Runtime) -> None:
    held = memory.CudaMemory()
    x = torch.ones(3)
    held.hold("a", [x])
    for call in (
        lambda: held.sleep("b", keep="host"),
        lambda: held.wake("b"),
        lambda: held.hold("b", [x]),
        lambda: held.sleep("a", keep="attic"),
    ):
        with pytest.raises(ValueError):
            call()
    held.sleep("a", keep="host")
    with pytest.raises(ValueError, match="sleeps"):
        held.hold("a", [torch.ones(1)])


def test_a_tag_that_finds_no_room_sleeps_on_with_its_content(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = memory.CudaMemory()
    x, y = torch.arange(5.0), torch.arange(7.0)
    held.hold("weights", [x, y])
    held.sleep("weights", keep="host")
    resize = torch.UntypedStorage.resize_

    def full(storage: torch.UntypedStorage, size: int) -> Any:
        if size == 28:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return resize(storage, size)

    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "resize_", full)
        with pytest.raises(torch.OutOfMemoryError):
            held.wake("weights")
    assert x.untyped_storage().nbytes() == 0 and held.stats().asleep == {"weights": "host"}
    held.wake("weights")
    assert x.tolist() == [0, 1, 2, 3, 4] and y.tolist() == [0, 1, 2, 3, 4, 5, 6]


def over_gloo(world: Any, ranks: tuple[int, ...], name: str) -> Any:
    """gloo in the place of NCCL: the same calls."""
    import torch.distributed as dist

    stores: Any = dist
    place = stores.PrefixStore(name, world.store)
    return stores.ProcessGroupGloo(place, ranks.index(world.rank), len(ranks), world.timeout)


def talk(rank: int, store: str, out: str) -> None:
    """One rank of three."""
    torch.set_num_threads(1)
    collectives.process_group = over_gloo
    comm = collectives.Nccl()
    comm.init(rank=rank, world=3, store=store, timeout=60.0)
    group = comm.group([0, 1, 2])
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = torch.full((2, 2), rank + 1, dtype=dtype).t()
        group.all_reduce(x, op="sum")
        found[f"sum {dtype}"] = x.tolist()
    x = torch.tensor([rank + 0.1], dtype=torch.float64)
    group.all_reduce(x, op="avg")
    found["avg"] = x.tolist()
    group.all_reduce(torch.empty(0), op="max")
    found["gather"] = group.all_gather(torch.tensor([[rank, 7]]).t()).tolist()
    flags = torch.tensor([[rank, 255]], dtype=torch.uint8)
    group.broadcast(flags, src=2)
    found["broadcast"] = flags.tolist()
    sends = [rank, 0, 1]
    rows = torch.arange(rank + 1.0, dtype=torch.float64) + 10 * rank
    received = [0, 1, 2] if rank == 0 else [1, 1, 1] if rank == 2 else [0, 0, 0]
    found["uneven"] = group.all_to_all(rows, send_counts=sends, recv_counts=received).tolist()
    found["scatter"] = group.reduce_scatter(torch.arange(3, dtype=torch.float64), op="avg").tolist()
    found["objects"] = group.gather_objects({"rank": rank})
    group.barrier()
    if rank < 2:
        found["pair"] = comm.group([0, 1]).all_gather(torch.tensor([rank])).tolist()
    comm.close()
    comm.close()
    Path(f"{out}.{rank}").write_text(repr(found))


def spawn(tmp_path: Path, call: Any, ranks: int) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    out, store = str(tmp_path / "found"), f"file://{tmp_path}/store"
    processes = [context.Process(target=call, args=(rank, store, out), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * ranks
    return [eval(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def test_collectives_between_processes(tmp_path: Path) -> None:
    found = spawn(tmp_path, talk, 3)
    for rank, row in enumerate(found):
        for dtype, six in (("float32", 6.0), ("float64", 6.0), ("int64", 6)):
            assert row[f"sum torch.{dtype}"] == [[six, six], [six, six]]
        assert row["avg"] == pytest.approx([1.1], abs=1e-15)
        assert row["gather"] == [[0], [7], [1], [7], [2], [7]]
        assert row["broadcast"] == [[2, 255]]
        assert row["scatter"] == [rank]
        assert row["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert [row["uneven"] for row in found] == [[10.0, 20.0, 21.0], [], [0.0, 11.0, 22.0]]
    assert found[0]["pair"] == found[1]["pair"] == [0, 1]


def lose(rank: int, store: str, out: str) -> None:
    """Rank 1 leaves without a call; rank 0 must not wait for ever."""
    torch.set_num_threads(1)
    collectives.process_group = over_gloo
    comm = collectives.Nccl()
    comm.init(rank=rank, world=2, store=store, timeout=3.0)
    group = comm.group([0, 1])
    said = ""
    if rank == 0:
        try:
            group.all_reduce(torch.ones(2), op="sum")
        except GrpoError as error:
            said = error.what
    comm.close()
    Path(f"{out}.{rank}").write_text(repr(said))


def test_a_peer_that_is_gone_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    assert spawn(tmp_path, lose, 2) == ["all_reduce failed: a peer did not answer or is gone", ""]


class Stuck:
    """A call that is never done, as NCCL's is when a peer never comes."""

    def is_completed(self) -> bool:
        return False


class Silent:
    def __init__(self) -> None:
        self.aborted = 0

    def name(self) -> str:
        return "nccl"

    def allreduce(self, tensors: Any, options: Any) -> Stuck:
        assert options.reduceOp == torch.distributed.ReduceOp.AVG
        return Stuck()

    def abort(self) -> None:
        self.aborted += 1


def test_a_call_that_is_never_done_is_given_up() -> None:
    from datetime import timedelta
    from types import SimpleNamespace

    handle = Silent()
    host: Any = SimpleNamespace(rank=0, size=2)
    group = collectives.NcclGroup(host, handle, timedelta(seconds=0.05))
    with pytest.raises(GrpoError, match="all_reduce failed: a peer did not answer") as error:
        group.all_reduce(torch.ones(2), op="avg")
    assert "rank 0 of 2 waited" in error.value.why and handle.aborted == 1


def test_a_process_alone_needs_no_store() -> None:
    comm = collectives.Nccl()
    comm.init(rank=0, world=1, store="", timeout=1.0)
    assert comm.group([0]).size == 1
    with pytest.raises(ValueError):
        comm.group([0, 1])
    comm.close()
