"""The CUDA device on a machine without one, and over a management library of ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_core.devices.pick import pick_device
from grpo_core.errors import PluginError
from grpo_core.plugins import load
from grpo_cuda import device, host, nvml
from grpo_cuda.device import CUDA, WORKSPACE, Cuda
from grpo_cuda.nvml import Driver, Gpu

LIBRARY = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit_v2(void) { return %(init)d; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "?"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12080; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "570.86.15", size); return 0; }
static int numbers[2] = {0, 1};
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = &numbers[index]; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory *info) {
  info->total = *(int *)handle ? 80ULL << 30 : 94ULL << 30; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = *(int *)handle ? 8 : 9; *minor = 0; return 0; }
int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
  strncpy(text, *(int *)handle ? "NVIDIA A100 80GB" : "NVIDIA H100 NVL", size); return 0; }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
  strncpy(text, *(int *)handle ? "GPU-bbbb-1" : "GPU-aaaa-0", size); return 0; }
"""
"""Two different GPUs, as NVML would tell of them."""


def build(folder: Path, *, init: int = 0) -> str:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "nvml.c", folder / f"libnvml{init}.so"
    source.write_text(LIBRARY % {"init": init})
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


def test_the_drivers_library_is_read_through_its_own_calls(tmp_path: Path) -> None:
    found = nvml.read_driver((str(tmp_path / "absent.so"), build(tmp_path)))
    assert isinstance(found, Driver)
    assert (found.version, found.cuda) == ("570.86.15", 128)
    assert found.gpus == (
        Gpu(name="NVIDIA H100 NVL", uuid="GPU-aaaa-0", memory_bytes=94 << 30, capability=90),
        Gpu(name="NVIDIA A100 80GB", uuid="GPU-bbbb-1", memory_bytes=80 << 30, capability=80),
    )


def test_a_driver_that_does_not_answer_says_why(tmp_path: Path) -> None:
    assert nvml.read_driver((build(tmp_path, init=9),)) == "the driver does not answer (Driver Not Loaded)"
    assert nvml.read_driver(("libnothing.so.7",)) == "no NVIDIA driver: libnothing.so.7 is not here"


def here(monkeypatch: pytest.MonkeyPatch, library: str, built_for: str | None = "12.8") -> None:
    read = nvml.read_driver
    monkeypatch.setattr(device, "read_driver", lambda: read((library,)))
    monkeypatch.setattr(host, "torch_built_for", lambda: built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_probe_takes_the_least_of_what_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, build(tmp_path))
    said = CUDA.probe()
    assert said.found and said.reason == "2 found, driver 570.86.15"
    assert (said.info.count, said.info.memory_bytes) == (2, 80 << 30)
    assert said.info.name == "NVIDIA H100 NVL" and said.info.vendor == "NVIDIA"
    assert said.info.features == {"graphs", "fast_bf16", "sm_80"}
    for value, count, features in (
        ("0", 1, {"graphs", "fast_bf16", "sm_90"}),
        ("GPU-bbbb", 1, {"graphs", "fast_bf16", "sm_80"}),
        ("1,7,0", 1, {"graphs", "fast_bf16", "sm_80"}),
        ("MIG-1234", 1, {"graphs", "fast_bf16", "sm_90"}),
        ("1, 0", 2, {"graphs", "fast_bf16", "sm_80"}),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        said = CUDA.probe()
        assert (said.info.count, said.info.features) == (count, features), value
    for value in ("", "-1", "GPU-cccc"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        said = CUDA.probe()
        assert not said.found and f"0 of 2 visible by CUDA_VISIBLE_DEVICES={value}" in said.reason


@pytest.mark.parametrize(
    ("built_for", "reason"),
    [
        (None, "package torch is not installed"),
        ("", "this torch is built without CUDA"),
        ("ROCm", "this torch is built for ROCm, not for CUDA"),
        ("13.0", "driver 570.86.15 serves CUDA up to 12.8, this torch is built for 13.0"),
    ],
)
def test_a_torch_that_does_not_go_with_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_for: str | None, reason: str
) -> None:
    here(monkeypatch, build(tmp_path), built_for)
    said = CUDA.probe()
    assert not said.found and said.info.count == 0
    assert said.reason.startswith(reason) and "(fix: " in said.reason
    # What it is stays known, for plans on paper.
    assert "sm_80" in said.info.features


@pytest.mark.parametrize(
    ("text", "built_for"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "12.8"),
        ("cuda = '11.8'\n", "11.8"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.2'\n", "ROCm"),
        ("cuda: Optional[str] = None\nhip = None\nxpu: Optional[str] = '20250'\n", "XPU"),
        ("cuda: Optional[str] = None\n", ""),
    ],
)
def test_what_torch_is_built_for_is_read_off_a_file(tmp_path: Path, text: str, built_for: str) -> None:
    (tmp_path / "version.py").write_text(text)
    assert host.torch_built_for(tmp_path) == built_for


def test_the_installed_torch_is_read_right() -> None:
    assert host.torch_built_for() == (torch.version.cuda or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_reasons_are_told_with_their_fixes() -> None:
    catalogue = load()
    said = CUDA.probe()
    assert not said.found and said.reason.count("(fix: ") >= 1
    assert "fast_bf16" in said.info.features
    assert pick_device("cuda", catalogue, absent=True)[0] is CUDA
    with pytest.raises(PluginError, match="is not here"):
        pick_device("cuda", catalogue)
    with pytest.raises(PluginError, match="cuda:0 cannot be opened") as error:
        Cuda(deterministic=False).open(0)
    assert "sees 0 GPU(s)" in error.value.why and "nvidia-smi" in error.value.fix


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch as far as `open` sets it up, with two GPUs."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.update(device=str(device)))
    monkeypatch.setattr(
        torch,
        "use_deterministic_algorithms",
        lambda on, warn_only: found.update(deterministic=(on, warn_only)),
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv(WORKSPACE, raising=False)
    return found


def test_equal_bits_are_set_up_before_the_first_product(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CUDA.open(1) == torch.device("cuda", 1)
    assert settings == {"device": "cuda:1", "deterministic": (True, True)}
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert device.os.environ[WORKSPACE] == ":4096:8"
    assert CUDA.settings()[WORKSPACE] == ":4096:8"
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_bf16_reduced_precision_reduction
    monkeypatch.setenv(WORKSPACE, ":16:8")
    CUDA.open(0)
    assert CUDA.settings()[WORKSPACE] == ":16:8"


def test_a_workspace_that_contradicts_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(PluginError, match="gives other bits from run to run"):
        CUDA.open(0)
    Cuda(deterministic=False).open(0)
    assert "deterministic" not in settings and WORKSPACE not in Cuda(deterministic=False).settings()


def test_an_index_that_is_not_there(settings: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="cuda:2 cannot be opened"):
        CUDA.open(2)


def test_a_seed_reaches_torch() -> None:
    before = torch.get_rng_state()
    try:
        CUDA.seed(-1)
        first = torch.rand(3)
        CUDA.seed(2**64 - 1)
        assert torch.equal(first, torch.rand(3))
    finally:
        torch.set_rng_state(before)
