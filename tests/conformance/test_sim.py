"""The simulated device: what it declares, how it is built, and what it does (sim_checks)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_conformance.case import Case
from grpo_conformance.sim import build as building
from grpo_conformance.sim.device import CAPACITY, SIM
from grpo_conformance.sim.offers import LIMITS, OWN, offers
from grpo_conformance.worker import Worker
from grpo_core.devices.pick import pick_device
from grpo_core.errors import PluginError
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plugins import load

sys.path.insert(0, str(Path(__file__).parent))  # the child imports sim_checks by name

CHECKS = (
    "late_copies", "events", "waits", "operands", "no_float64", "memory", "views", "generators", "faults",
    "gradients", "pages", "second_device",
)  # fmt: skip
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    building.build(Path.home() / building.CACHE)
    worker = Worker("sim")
    yield worker
    worker.close()


@needs_compiler
@pytest.mark.parametrize("name", CHECKS)
def test_the_device_does_it(worker: Worker, name: str) -> None:
    outcome = worker.run(Case(id=name, level=1, subject="device", run=f"sim_checks:{name}", timeout=120.0))
    assert (outcome.status, outcome.message) == ("pass", "")


def test_its_plugin_loads_no_torch_and_no_compiler() -> None:
    code = (
        "import sys, grpo_conformance.sim.plugin as p\n"
        "n = sum(len(list(getattr(p, h)())) for h in dir(p) if h.startswith('grpo_'))\n"
        "assert n > 25 and 'torch' not in sys.modules and 'subprocess' not in sys.modules, n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_it_is_installed_and_never_chosen_by_auto() -> None:
    catalogue = load()
    assert catalogue.devices["sim"] == SIM
    assert pick_device("auto", catalogue)[0].name != "sim"
    device, info = pick_device("sim", catalogue)
    assert device is SIM
    assert (info.count, info.memory_bytes) == (2, CAPACITY)
    assert "simulated" in info.features and "float64" not in info.dtypes


def test_it_offers_every_op_that_has_a_reference() -> None:
    hooks = {contract.hook for contract in CONTRACTS.values()}
    listed = {impl.op: impl for hook in hooks for impl in offers(hook)}
    assert set(listed) == {
        op for op, row in CONTRACTS.items() if row.reference and not op.startswith("engine.")
    }
    assert set(OWN) | set(LIMITS) <= set(listed)
    heads = listed["attention.varlen"].limits["head_dim"]
    assert [size in heads for size in (8, 16, 24, 64, 100, 256, 272)] == [
        False, True, False, True, False, True, False,
    ]  # fmt: skip
    assert all("float64" not in impl.limits.get("dtype", ()) for impl in listed.values())
    assert CAPACITY == 4 << 30


def test_the_cache_of_pages_reads_its_own_layout_only() -> None:
    readers = [impl for impl in offers("attention") if impl.op in ("attention.prefill", "attention.decode")]
    assert [impl.limits["cache"] for impl in readers] == [{"sim:plain"}] * 2


def test_no_compiler_is_told_in_three_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PluginError, match="no compiler") as raised:
        building.build(tmp_path)
    assert len(str(raised.value).splitlines()) == 3
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_broken_sources_are_told_by_their_errors(tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "broken.cpp").write_text("int main( { return nonsense; }\n")
    with pytest.raises(PluginError, match=r"g\+\+ failed: .*error") as raised:
        building.build(tmp_path / "cache", sources)
    assert len(str(raised.value).splitlines()) == 3
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_other_sources_are_another_library(tmp_path: Path) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(building.SOURCES, copy)
    assert building.key(copy) == building.key()
    (copy / "device.h").write_text("// changed\n")
    assert building.key(copy) != building.key()
