from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_cpu import malloc, memory
from grpo_cpu.memory import CpuMemory

needs_glibc = pytest.mark.skipif(not malloc.tune().applied, reason=malloc.tune().reason)
needs_clear_refs = pytest.mark.skipif(not memory.CLEAR.exists(), reason="the kernel keeps no clear_refs")
MIB = 1 << 20


def test_sleep_to_the_host_is_on_disk_and_bit_exact() -> None:
    held, under_test = torch.randn(1000), CpuMemory()
    kept = held.clone()
    under_test.hold("weights", [held])
    under_test.sleep("weights", keep="host")
    assert under_test.stats().asleep == {"weights": "disk"}
    assert held.untyped_storage().nbytes() == 0
    under_test.wake("weights")
    assert torch.equal(held, kept)


SLEEPS = """
import torch
from grpo_cpu.memory import CpuMemory
under_test = CpuMemory()
held = torch.ones(64 << 18)
under_test.hold("weights", [held])
awake = under_test.stats().reserved
under_test.sleep("weights", keep="none")
print(awake - under_test.stats().reserved)
under_test.wake("weights")
assert held.sum() == 0
"""


@needs_glibc
def test_sleep_gives_memory_back_to_the_system() -> None:
    """In a process of its own: one that has much free heap serves the tensor from there, and keeps it."""
    done = subprocess.run([sys.executable, "-c", SLEEPS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 56 * MIB


@needs_glibc
@pytest.mark.parametrize("free, trims", [(memory.LITTLE - 1, 0), (memory.LITTLE, 1), (None, 1)])
def test_a_little_free_memory_is_kept(monkeypatch: pytest.MonkeyPatch, free: int | None, trims: int) -> None:
    """Paging in what a small model frees at every step took a third of the step."""
    calls: list[int] = []
    monkeypatch.setattr(malloc, "free_bytes", lambda: free)
    monkeypatch.setattr(malloc, "trim", lambda: calls.append(1))
    CpuMemory().empty_cache()
    assert len(calls) == trims


@needs_glibc
def test_free_bytes_are_those_of_freed_tensors() -> None:
    malloc.trim()
    # Small enough to come from the heap.
    held = [torch.ones(4 * MIB // 4) for _ in range(16)]
    before = malloc.free_bytes()
    if before is None:
        pytest.skip("this glibc has no mallinfo2")
    held.clear()
    after = malloc.free_bytes()
    assert after is not None and 60 * MIB < after - before < 80 * MIB


@needs_clear_refs
def test_the_peak_is_the_kernels_and_can_be_reset() -> None:
    under_test = CpuMemory()
    under_test.empty_cache()
    under_test.reset_peak()
    before = under_test.stats().reserved
    torch.ones(96 * MIB // 4).sum()
    assert under_test.stats().peak >= before + 80 * MIB
    under_test.empty_cache()
    under_test.reset_peak()
    lowered = under_test.stats()
    assert lowered.peak <= lowered.reserved + 8 * MIB
    torch.ones(96 * MIB // 4).sum()
    assert under_test.stats().peak >= lowered.peak + 80 * MIB


def test_a_peak_that_the_kernel_does_not_reset_is_followed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    under_test = CpuMemory()
    under_test.reset_peak()
    assert abs(under_test.stats().peak - under_test.stats().reserved) < 8 * MIB


GROWTH = """
import sys, torch
torch.set_num_threads(1)
from grpo_cpu import malloc
if sys.argv[1] == "tuned":
    assert malloc.tune().applied
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
w = torch.ones(1024, 256, dtype=torch.bfloat16)
for rows in range(100, 140):
    torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), w)
before = resident()
for rows in range(140, 340):
    torch.nn.functional.linear(torch.ones(rows, 256, dtype=torch.bfloat16), w)
print(resident() - before)
"""


@needs_glibc
def test_memory_does_not_grow_with_every_new_number_of_rows() -> None:
    """oneDNN would keep the compiled product of each of 200 shapes, some 0.2 to 0.6 MB."""
    # The tests' own process is tuned already, and children inherit that.
    clean = {name: value for name, value in os.environ.items() if name not in malloc.PRIMITIVES}
    plain, tuned = (
        int(
            subprocess.run(
                [sys.executable, "-c", GROWTH, mode], check=True, capture_output=True, text=True, env=clean
            ).stdout
        )
        for mode in ("plain", "tuned")
    )
    if plain < 20 * MIB:
        pytest.skip("this build of torch keeps no product for each shape")
    assert tuned < plain / 3


def test_tuning_is_refused_with_a_reason_off_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.platform, "libc_ver", lambda: ("", ""))
    tuning = malloc.tune.__wrapped__()
    assert (tuning.applied, tuning.reason) == (False, "the C library is not glibc")
    assert malloc.trim() is False and malloc.free_bytes() is None
