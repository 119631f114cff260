"""The Ascend device on a machine without one, its memory over counters, its collectives over gloo."""

from __future__ import annotations

import multiprocessing
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_ascend import host
from grpo_ascend.device import ASCEND, Ascend
from grpo_core.devices.pick import pick_device
from grpo_core.errors import PluginError
from grpo_core.plugins import load


def test_the_probe_names_what_is_missing_and_how_to_mend_it() -> None:
    said = ASCEND.probe()
    assert not said.found and said.info.count == 0
    for lack in (
        "no device file matches /dev/davinci",
        "CANN is not installed",
        "torch_npu is not installed",
    ):
        assert lack in said.reason
    assert said.reason.count("(fix: ") == 3
    assert said.info.dtypes == {"bfloat16", "float16", "float32"}


def test_lacks_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device files are passed to it, but neither the managers' nor the driver; CANN is there, not sourced."""
    for index in range(4):
        (tmp_path / f"davinci{index}").touch()
    monkeypatch.setattr(host, "NODES", str(tmp_path / "davinci[0-9]*"))
    monkeypatch.setattr(host, "TOOLKITS", (str(tmp_path),))
    assert host.chips() == 4
    lacks = [str(lack) for lack in host.lacks({})]
    assert any("/dev/davinci_manager" in lack and "--device=/dev/hisi_hdc" in lack for lack in lacks)
    assert any("mount the driver" in lack for lack in lacks)
    assert any(f"source {tmp_path}/set_env.sh" in lack for lack in lacks)
    assert not any("CANN" in str(lack) for lack in host.lacks({"ASCEND_HOME_PATH": str(tmp_path)}))


def test_a_pair_of_torch_and_torch_npu_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: object())
    versions = {"torch": "2.9.0+cpu", "torch-npu": "2.10.0.post4"}
    monkeypatch.setattr(host, "installed_version", versions.get)
    assert any("pip install torch==2.10.0" in str(lack) for lack in host.lacks({}))
    versions["torch"] = "2.10.0"
    assert not any("no pair" in str(lack) for lack in host.lacks({}))


def test_a_simulated_toolkit_needs_no_device_files_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "simulated").write_text("3\n")
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path))
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(host, "installed_version", lambda name: "2.13.0")
    said = ASCEND.probe()
    assert said.found and said.info.count == 3
    assert "simulated" in said.info.features and "simulated" in said.info.name
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    assert ASCEND.probe().info.count == 1
    # Asked for by name only: it is no hardware.
    assert pick_device("auto", load())[0].name == "cpu"
    assert pick_device("ascend", load())[1].count == 1


@pytest.mark.parametrize(("value", "count"), [(None, 8), ("0,3", 2), ("", 0), ("0,1,2,3,4,5,6,7,8,9", 8)])
def test_visible_chips(value: str | None, count: int) -> None:
    environment = {} if value is None else {"SEEN": value}
    assert host.visible(environment, "SEEN", 8) == count


def test_auto_passes_over_it_and_asking_for_it_tells_why() -> None:
    catalogue = load()
    assert pick_device("auto", catalogue)[0].name == "cpu"
    with pytest.raises(PluginError, match="is not here") as error:
        pick_device("ascend", catalogue)
    assert "davinci" in error.value.why
    device, info = pick_device("ascend", catalogue, absent=True)
    assert device is ASCEND and info.type == "npu"


def test_opening_it_without_torch_npu_tells_what_to_do() -> None:
    with pytest.raises(PluginError, match="torch_npu cannot be loaded") as error:
        ASCEND.open(0)
    assert "set_env.sh" in error.value.fix and "davinci" in error.value.why


class Runtime:
    """`torch_npu.npu` as far as the plugin uses it, with a list of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.config = SimpleNamespace(allow_internal_format=True)
        self.conv, self.matmul = SimpleNamespace(allow_hf32=True), SimpleNamespace(allow_hf32=True)
        self.memory = SimpleNamespace(_set_allocator_settings=self.note("settings"))
        self.reserved = 0

    def note(self, name: str) -> Any:
        def call(*args: object, **kwargs: object) -> None:
            self.asked.append(" ".join([name, *map(str, args), *map(str, kwargs.values())]))

        return call

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def memory_allocated(self) -> int:
        return 5

    def memory_reserved(self) -> int:
        return self.reserved

    def max_memory_allocated(self) -> int:
        return 9

    def __getattr__(self, name: str) -> Any:
        return self.note(name)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    npu = Runtime()
    module: Any = ModuleType("torch_npu")
    module.npu, module.__spec__ = npu, ModuleSpec("torch_npu", None)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda on, warn_only: npu.asked.append(f"deterministic {on}")
    )
    monkeypatch.setattr(torch, "device", lambda kind, index: f"{kind}:{index}")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    return npu


def test_determinism_comes_before_anything_runs_on_the_device(runtime: Runtime) -> None:
    assert ASCEND.open(1) == "npu:1"
    assert runtime.asked == ["deterministic True", "set_compile_mode False", "set_device npu:1"]
    assert runtime.config.allow_internal_format is False
    assert runtime.conv.allow_hf32 is False, "float32 is to be float32"
    assert runtime.matmul.allow_hf32 is False
    assert not torch.utils.deterministic.fill_uninitialized_memory
    runtime.asked.clear()
    Ascend(deterministic=False).open(0)
    assert "deterministic True" not in runtime.asked


def test_an_index_that_is_not_there(runtime: Runtime) -> None:
    with pytest.raises(PluginError, match="ascend:2 cannot be opened"):
        ASCEND.open(2)


def test_memory_sleeps_on_the_host_and_gives_its_cache_back(
    ascend: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu = Runtime()
    monkeypatch.setattr(ascend.memory.torch_npu, "npu", npu, raising=False)
    memory = ascend.memory.NpuMemory()
    assert npu.asked == ["settings expandable_segments:True"]
    x = torch.arange(6.0)
    memory.hold("weights", [x])
    memory.sleep("weights", keep="host")
    assert x.untyped_storage().nbytes() == 0 and npu.asked[-2:] == ["synchronize", "empty_cache"]
    memory.wake("weights")
    assert x.tolist() == [0, 1, 2, 3, 4, 5]
    stats = memory.stats()
    assert (stats.allocated, stats.reserved, stats.peak, stats.by_tag) == (5, 0, 9, {"weights": 24})
    npu.reserved, npu.asked = 1, []
    ascend.memory.NpuMemory()
    assert not npu.asked, "segments cannot be made expandable once there are some"


def talk(rank: int, store: str, out: str) -> None:
    """One rank of three, with gloo in the place of HCCL."""
    torch.set_num_threads(1)
    sys.modules["torch_npu"] = ModuleType("torch_npu")
    import torch.distributed as dist

    from grpo_ascend import collectives

    def over_gloo(world: Any, ranks: tuple[int, ...], name: str, buffer_mb: int) -> Any:
        stores: Any = dist
        place = stores.PrefixStore(name, world.store)
        return stores.ProcessGroupGloo(place, ranks.index(world.rank), len(ranks), world.timeout)

    collectives.process_group = over_gloo
    comm = collectives.Hccl()
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
    found["gather"] = group.all_gather(torch.tensor([rank == 1])).tolist()
    flags = torch.tensor([[rank, 255]], dtype=torch.uint8)
    group.broadcast(flags, src=2)
    found["broadcast"] = flags.tolist()
    sends = [rank, 0, 1]
    rows = torch.arange(rank + 1.0, dtype=torch.float64) + 10 * rank
    received = [0, 1, 2] if rank == 0 else [1, 1, 1] if rank == 2 else [0, 0, 0]
    found["uneven"] = group.all_to_all(rows, send_counts=sends, recv_counts=received).tolist()
    found["scatter"] = group.reduce_scatter(torch.arange(3, dtype=torch.float64), op="avg").tolist()
    found["objects"] = group.gather_objects({"rank": rank})
    if rank < 2:
        found["pair"] = comm.group([0, 1]).all_gather(torch.tensor([rank])).tolist()
    comm.close()
    comm.close()
    Path(f"{out}.{rank}").write_text(repr(found))


def test_collectives_between_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    out = str(tmp_path / "found")
    store = f"file://{tmp_path}/store"
    processes = [context.Process(target=talk, args=(rank, store, out), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    found = [eval(Path(f"{out}.{rank}").read_text()) for rank in range(3)]
    for rank, row in enumerate(found):
        for dtype, six in (("float32", 6.0), ("float64", 6.0), ("int64", 6)):
            assert row[f"sum torch.{dtype}"] == [[six, six], [six, six]]
        assert row["avg"] == pytest.approx([1.1], abs=1e-15)
        assert row["gather"] == [False, True, False]
        assert row["broadcast"] == [[2, 255]]
        assert row["scatter"] == [rank]
        assert row["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert [row["uneven"] for row in found] == [[10.0, 20.0, 21.0], [], [0.0, 11.0, 22.0]]
    assert found[0]["pair"] == found[1]["pair"] == [0, 1]


def test_a_process_alone_needs_no_store(ascend: SimpleNamespace) -> None:
    comm = ascend.collectives.Hccl()
    comm.init(rank=0, world=1, store="", timeout=1.0)
    assert comm.group([0]).size == 1
    with pytest.raises(ValueError):
        comm.group([0, 1])
    comm.close()
