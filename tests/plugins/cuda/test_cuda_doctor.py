"""What `grpo doctor --device cuda` finds where the driver, torch and the packages say this or that."""

from __future__ import annotations

import json
import re
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_core.devices.doctor import Check
from grpo_cuda import doctor, doctor_packages, libcuda
from grpo_cuda.nvml import Driver, Gpu
from grpo_cuda.rows import BUILDERS, rows

H200 = Gpu(name="NVIDIA H200", uuid="GPU-1", memory_bytes=141 << 30, capability=90)
T4 = Gpu(name="Tesla T4", uuid="GPU-2", memory_bytes=15 << 30, capability=75)
ARCHS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


def driver(*gpus: Gpu, version: str = "580.65.06", cuda: int = 130) -> Driver:
    return Driver(version=version, cuda=cuda, gpus=gpus)


class Host:
    """What a host's driver and torch say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver: Driver | str = driver(H200, H200)
        self.built_for = "13.0"
        self.torch = SimpleNamespace(returncode=0, stdout=json.dumps({"count": 2, "archs": ARCHS}), stderr="")
        self.environment = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}
        self.versions = {"torch": "2.13.0+cu130"}
        monkeypatch.setattr(doctor, "read_driver", lambda: self.driver)
        monkeypatch.setattr(doctor.host, "torch_built_for", lambda: self.built_for)
        monkeypatch.setattr(doctor.subprocess, "run", lambda *words, **options: self.torch)
        monkeypatch.setattr(doctor.libcuda, "check", lambda found: Check(part="libcuda", status="ok", why=""))
        for module in (doctor, doctor_packages):
            monkeypatch.setattr(module, "installed_version", self.versions.get)

    def found(self) -> dict[str, Check]:
        return {check.part: check for check in doctor.checks(self.environment)}


@pytest.fixture
def cuda_host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_a_host_that_has_all_it_needs(cuda_host: Host) -> None:
    found = cuda_host.found()
    assert [part for part, check in found.items() if check.status in ("missing", "wrong")] == []
    assert found["driver"].why == "580.65.06, CUDA up to 13.0, 2 GPU(s)"
    assert found["GPUs"].why == "2 visible: NVIDIA H200, 141 GiB, compute capability 9.0"
    assert found["torch"].why == "2.13.0+cu130, built for CUDA 13.0"
    assert found["torch's view"].status == "ok"


def test_a_laptop_with_a_torch_for_the_cpu(cuda_host: Host) -> None:
    cuda_host.driver, cuda_host.built_for = "no NVIDIA driver: libnvidia-ml.so.1 is not here", ""
    found = cuda_host.found()
    assert found["driver"].status == "missing" and "container" in found["driver"].fix
    assert found["torch"].status == "wrong" and "download.pytorch.org" in found["torch"].fix
    assert found["tested row"].status == "unknown"
    assert not {"GPUs", "libcuda", "torch's view"} & set(found)


def test_a_driver_that_is_too_old_for_this_torch(cuda_host: Host) -> None:
    cuda_host.driver = driver(H200, version="535.54", cuda=122)
    found = cuda_host.found()
    assert found["driver"].status == "ok"
    assert found["torch"].status == "wrong" and "CUDA up to 12.2" in found["torch"].why
    assert "torch's view" not in found


def test_gpus_that_are_old_hidden_or_unlike(cuda_host: Host) -> None:
    cuda_host.driver = driver(T4)
    assert "bfloat16" in cuda_host.found()["GPUs"].why
    cuda_host.driver = driver(H200, T4)
    assert cuda_host.found()["GPUs"].status == "advice"
    cuda_host.environment["CUDA_VISIBLE_DEVICES"] = "0"
    assert cuda_host.found()["GPUs"].status == "ok"
    cuda_host.environment["CUDA_VISIBLE_DEVICES"] = "-1"
    assert "hides them all" in cuda_host.found()["GPUs"].why


def test_what_torch_sees_is_held_against_the_driver(cuda_host: Host) -> None:
    cuda_host.torch.stdout = json.dumps({"count": 1, "archs": ARCHS})
    assert cuda_host.found()["torch's view"].why == "torch counts 1 GPU(s), the driver 2"
    cuda_host.torch.stdout = "a greeting\n" + json.dumps({"count": 2, "archs": ["sm_80"]})
    assert "none for capability 9.0" in cuda_host.found()["torch's view"].why
    cuda_host.torch = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: libcudart")
    assert cuda_host.found()["torch's view"].why == "asking it failed: ImportError: libcudart"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        (90, ["sm_90"], True),
        (89, ["sm_80"], True),  # machine code of the same major
        (80, ["sm_86"], False),  # but of no higher minor
        (90, ["sm_80"], False),
        (90, ["compute_80"], True),  # PTX is compiled for newer GPUs
        (80, ["compute_90"], False),
        (90, ["sm_90a"], True),
        (91, ["sm_90a"], False),  # only for just that GPU
        (100, ["sm_90", "sm_100"], True),
        (90, ["nonsense"], False),
    ],
)
def test_code_of_a_torch_runs_on_a_gpu(capability: int, archs: list[str], runs: bool) -> None:
    assert doctor.covered(capability, archs) is runs


def test_libcuda_belongs_to_the_driver() -> None:
    def said(name: str) -> Check:
        return libcuda.judge(Path("/usr/lib") / name, driver(H200))

    assert said("libcuda.so.580.65.06").status == "ok"
    assert said("libcuda.so.590.10").status == "advice"
    older = said("libcuda.so.575.57.08")
    assert older.status == "wrong" and "/usr/lib out of LD_LIBRARY_PATH" in older.fix
    assert said("libcuda.so.1").status == libcuda.judge(None, driver(H200)).status == "unknown"


def test_a_host_without_libcuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "NAME", "libcuda-of-nobody.so.1")
    said = libcuda.check(driver(H200))
    assert said.status == "missing" and "NVIDIA_DRIVER_CAPABILITIES" in said.fix


def test_the_file_behind_a_loaded_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "libcuda.so.580.65.06"
    real.touch()
    (tmp_path / "libcuda.so.1").symlink_to(real)
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 08:01 42    {tmp_path}/libcuda.so.1\n")
    monkeypatch.setattr(libcuda, "MAPS", maps)
    assert libcuda.loaded() == real.resolve()
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 42    /lib/libc.so.6\n")
    assert libcuda.loaded() is None


def test_releases_of_transformer_engine_go_together(cuda_host: Host) -> None:
    engine = doctor_packages._transformer_engine
    assert "cuDNN" in engine("13.0").why
    cuda_host.versions.update({"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"})
    assert "missing: transformer-engine-cu13" in engine("13.0").why
    cuda_host.versions["transformer-engine-cu13"] = "2.20.2"
    assert engine("13.0").status == "ok"
    assert "missing: transformer-engine-cu12" in engine("12.8").why
    cuda_host.versions["transformer-engine-torch"] = "2.19.0"
    assert "must be one release" in engine("13.0").why


def test_what_torch_pins_is_held_against_what_is_installed(
    cuda_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = ['triton==3.7.1; platform_system == "Linux"', "triton-kernels==1", "nvidia-nccl-cu13==2.28.9"]
    monkeypatch.setattr(doctor_packages, "_requires", lambda name: pins)
    monkeypatch.setattr(
        doctor_packages, "unmet", lambda item: None if "nccl" in item else f"needs {item}, 3.6.0 is installed"
    )
    cuda_host.versions.update({"triton": "3.6.0", "nvidia-nccl-cu13": "2.28.9"})
    found = cuda_host.found()
    assert found["triton"].status == "advice" and found["triton"].fix == "pip install 'triton==3.7.1'"
    assert found["NCCL"].why == "nvidia-nccl-cu13 2.28.9"


def test_flash_linear_attention_and_its_core(cuda_host: Host) -> None:
    assert doctor_packages._fla().fix == 'pip install "grpo-core[cuda]"'
    cuda_host.versions.update({"fla-core": "0.6.0", "flash-linear-attention": "0.5.0"})
    assert doctor_packages._fla().fix == "pip install flash-linear-attention==0.6.0"
    cuda_host.versions["flash-linear-attention"] = "0.6.0"
    assert doctor_packages._fla().status == "ok"


def test_the_web_toolkit_called_apex(cuda_host: Host) -> None:
    assert "apex" not in cuda_host.found()
    cuda_host.versions["apex"] = "0.9.10.dev0"
    assert cuda_host.found()["apex"].fix == "pip uninstall apex"


def test_the_toolkit_is_of_torchs_cuda(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    environment = {"PATH": "/nowhere", "CUDA_HOME": str(tmp_path)}
    said = doctor_packages._toolkit("13.0", environment)
    assert said.status == "advice" and "is of CUDA 12.8, torch of 13.0" in said.why
    assert doctor_packages._toolkit("12.6", environment).status == "ok"
    assert "no nvcc" in doctor_packages._toolkit("13.0", {"PATH": "/", "CUDA_HOME": "/nowhere"}).why


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, "wrong"),
        ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, ""),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "advice"),
        ({"CUDA_LAUNCH_BLOCKING": "0"}, ""),
        ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "advice"),
    ],
)
def test_variables_that_spoil_a_run(settings: dict[str, str], status: str) -> None:
    assert [check.status for check in doctor._settings(settings)] == ([status] if status else [])


def test_cards_that_read_memory_themselves_want_it_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(doctor, "CARDS", tmp_path)
    found = {check.part: check for check in doctor._host({})}
    assert found["RDMA"].why == "cards: mlx5_0" and "locked memory" in found
    monkeypatch.setattr(doctor, "CARDS", tmp_path / "none")
    assert "RDMA" not in {check.part for check in doctor._host({})}


def test_an_audited_row_is_in_the_audits_surface() -> None:
    """A simulated one is also what Triton's interpreter ran here; hardware needs a committed report."""
    path = Path(str(files("grpo_cuda"))) / "vendor_surface.json"
    packages = json.loads(path.read_text(encoding="utf-8"))["packages"] if path.exists() else []
    archives = {one["distribution"]: one["archives"] for one in packages}
    for row in rows():
        assert row.proof != "hardware", "no report from hardware is committed"
        if row.proof:
            held = {name for name, version in row.versions.items() if version in archives.get(name, ())}
            assert held >= {"torch", "triton", "fla-core", "flash-attn", "transformer-engine"}, row.name
        if row.proof == "simulated":
            assert row.versions["triton"] == metadata.version("triton")


def test_constraints_say_what_the_rows_say() -> None:
    names = set()
    for row in rows():
        package, _, rest = row.constraints.partition("/")
        text = files(package).joinpath(rest).read_text(encoding="utf-8")
        pins = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
        for name in ("torch", "triton", "flash-attn", "fla-core", "transformer-engine"):
            assert pins[name] == row.versions[name], (row.name, name)
        assert pins["fla-core"] == pins["flash-linear-attention"]
        names.add(rest.removeprefix("constraints/"))
    assert names == {path.name for path in files("grpo_cuda").joinpath("constraints").iterdir()}


def test_sources_are_built_only_where_the_user_asks_for_it() -> None:
    for row in rows():
        for step in row.steps:
            built = re.search(r"flash-attn|transformer-engine|causal-conv1d|FlashMLA", step.command)
            assert bool(built) == ("--no-build-isolation" in step.command)
            assert step.optional == (bool(built) or BUILDERS in step.command)
            assert "apex" not in step.command
