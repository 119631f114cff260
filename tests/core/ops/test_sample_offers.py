"""`sample.token`: reference, torch offer and C++ pack of the CPU, by the same checks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import sample_checks as check
import torch

from grpo_core.ops.reference import fused
from grpo_cpu import sample
from grpo_cpu.native import compiler, cpu_flags

Sample = Callable[..., Any]
FILTERS = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (40, 0.9, 0.02), (1, 0.5, 0.5)]
KINDS = {
    "core_reference": lambda: fused.sample_token,
    "cpu_torch": lambda: sample.sample_token,
    "cpu_native": lambda: importlib.import_module("grpo_cpu.native_ops").sample_token,
}


@pytest.fixture(params=KINDS)
def offered(request: pytest.FixtureRequest) -> Sample:
    if request.param == "cpu_native" and ("avx512_bf16" not in cpu_flags() or compiler() is None):
        pytest.skip("the C++ pack needs AVX512-BF16 and a compiler")
    return KINDS[request.param]()


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(2, torch.float32), (300, torch.float32), (300, torch.bfloat16)]
)
def test_draws_invert_the_distribution(
    offered: Sample, vocab: int, dtype: torch.dtype, temperature: float, filters: tuple[int, float, float]
) -> None:
    check.check_inverse_of_the_distribution(offered, vocab, dtype, temperature, *filters)


def test_frequencies(offered: Sample) -> None:
    check.check_frequencies(offered)


def test_edges(offered: Sample) -> None:
    check.check_edges(offered)


def test_infinities_and_nan(offered: Sample) -> None:
    check.check_infinities(offered)


def test_rows_of_different_kinds(offered: Sample) -> None:
    check.check_rows_of_different_kinds(offered)
