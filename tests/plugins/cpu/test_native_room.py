"""Memory of the results of the C++ pack."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo_cpu.memory import CpuMemory
from grpo_cpu.native import compiler, cpu_flags, load

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)

MIB = 1 << 20
LIKE = torch.empty(0, dtype=torch.bfloat16)


def rows(mib: float) -> torch.Tensor:
    made: torch.Tensor = load().empty_rows(LIKE, int(mib * 1024), 512)
    return made


@pytest.fixture
def ops() -> Any:
    gc.collect()
    load().release_room()
    return load()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_freed_block_serves_the_next_result_of_about_its_size(ops: Any) -> None:
    other, first = rows(1), rows(4)
    address = first.data_ptr()
    del first
    assert rows(3.75).data_ptr() == address
    assert rows(2).data_ptr() != address
    del other


def test_results_do_not_overlap(ops: Any) -> None:
    made = [rows(mib).fill_(index) for index, mib in enumerate((1, 40, 3, 0.5, 7, 1, 30, 0.1))]
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(made))


def test_releasing_keeps_what_is_in_use_and_returns_the_rest(ops: Any) -> None:
    kept, gone = rows(20).fill_(3), rows(64).fill_(1)
    before = resident()
    del gone
    assert ops.release_room() >= 64 * MIB
    assert before - resident() > 60 * MIB
    assert bool((kept == 3).all())
    del kept
    assert ops.release_room() > 0 and ops.release_room() == 0


def test_emptying_the_cache_of_the_device_releases_it(ops: Any) -> None:
    rows(160).fill_(1)
    before = resident()
    CpuMemory().empty_cache()
    assert before - resident() > 150 * MIB


def test_a_result_can_be_resized_and_outlives_its_view(ops: Any) -> None:
    view = rows(2).fill_(5)[1:]
    assert bool((view == 5).all())
    storage = view.untyped_storage()
    storage.resize_(0)
    storage.resize_(8 * MIB)
    assert storage.nbytes() == 8 * MIB


def test_many_batches_of_slightly_different_sizes_need_no_more_than_the_largest(ops: Any) -> None:
    def batch(factor: float) -> None:
        held = [rows(mib * factor).fill_(1) for mib in (0.6, 1.0, 3.3, 0.6, 1.7) for _ in range(8)]
        assert len(held) == 40

    batch(1.0)
    before = resident()
    for factor in (0.99, 0.96, 1.0, 0.94, 0.98):
        batch(factor)
    assert resident() - before < 8 * MIB


def test_training_grew_by_blocks_of_sizes_that_only_the_rollout_had(ops: Any) -> None:
    rollout = [rows(0.5).fill_(1) for _ in range(40)]
    before = resident()
    del rollout
    train = [rows(4).fill_(index) for index in range(5)]
    assert resident() - before < 2 * MIB
    assert all(bool((tensor == index).all()) for index, tensor in enumerate(train))


def test_little_room_is_kept_because_paging_it_in_again_costs_a_small_model_half_its_step(ops: Any) -> None:
    gone = rows(20).fill_(1)
    del gone
    assert ops.release_room(64 * MIB) == 0
    assert ops.release_room(16 * MIB) > 0
