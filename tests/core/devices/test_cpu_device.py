"""The CPU's probe, from files that look like real machines', and its generator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_core.devices import cpu
from grpo_core.devices.cpu import Cpu, features, memory_bytes, read_cpuinfo

GENOA = "processor\t: 0\nmodel name\t: AMD EPYC 9R14\nflags\t\t: fpu avx2 avx512f avx512_bf16 sse2\n"
SAPPHIRE = "model name\t: Intel(R) Xeon(R) 8488C\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
HASWELL = "model name\t: Intel(R) Core(TM) i7-4770\nflags\t\t: avx2 fma\n"
GRAVITON = "processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: fp asimd sve bf16 i8mm\n"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (GENOA, "AMD EPYC 9R14", {"avx2", "avx512f", "avx512_bf16", "fast_bf16"}),
        (SAPPHIRE, "Intel(R) Xeon(R) 8488C",
         {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "fast_bf16"}),
        (HASWELL, "Intel(R) Core(TM) i7-4770", {"avx2"}),
        (GRAVITON, "", {"arm_bf16", "fast_bf16"}),
    ],
)  # fmt: skip
def test_features_follow_the_flags(tmp_path: Path, text: str, name: str, expected: set[str]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    product, flags = read_cpuinfo(path)
    assert product == name
    assert features(flags) - {"compiler"} == expected


def test_a_system_without_cpuinfo_is_probed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "absent")
    said = Cpu().probe()
    assert said.found and said.info.type == "cpu" and said.info.name
    assert "fast_bf16" not in said.info.features and "bfloat16" in said.info.dtypes


def test_the_compiler_is_a_feature_only_where_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compiler" not in Cpu().probe().info.features
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert "compiler" in Cpu().probe().info.features


def test_the_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(cpu, "CGROUP_LIMITS", (limit,))
    whole = memory_bytes()
    assert whole > 2**20
    limit.write_text("1048576\n")
    assert memory_bytes() == 2**20
    limit.write_text("max\n")
    assert memory_bytes() == whole


def test_the_generator_repeats_after_seed_and_after_restoring_its_state() -> None:
    device = Cpu()
    assert device.open(0) == torch.device("cpu")
    device.seed(7)
    state = device.rng_state()
    first = torch.rand(4)
    device.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    device.seed(7 + 2**64)
    assert torch.equal(torch.rand(4), first)


def test_probing_imports_no_torch() -> None:
    code = "import sys; from grpo_core.devices.cpu import Cpu; Cpu().probe(); print('torch' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip() == "False"
