"""What is particular to `moe.*` of the C++ pack."""

from __future__ import annotations

import importlib

import moe_checks as check
import pytest
import torch

from grpo_core.impl import DeviceInfo, Need
from grpo_core.ops.reference import moe as reference
from grpo_cpu import native_offers
from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_moe")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_many_tokens_and_experts_are_routed_as_by_the_reference_on_any_number_of_threads(score: str) -> None:
    logits = check.randn(400, 200, dtype=torch.float32, seed=0)
    arguments = {**check.FREE, "score": score, "top_k": 8, "num_groups": 8, "topk_groups": 3}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(native.route(logits, **arguments))
    finally:
        torch.set_num_threads(threads)
    weights, ids = reference.route(logits, **arguments)
    assert torch.equal(found[0][1], ids) and torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], weights, rtol=2e-6, atol=0)


@pytest.mark.parametrize("size", [(33, 7), (1, 1), (17, 65)])
def test_experts_of_odd_sizes_in_float32(size: tuple[int, int]) -> None:
    check.check_experts(native.experts, torch.float32, "uneven", *size)
    check.check_experts(native.experts, torch.float32, "more rows than a block", *size)


@pytest.mark.parametrize("count", range(1, 20))
def test_experts_of_few_rows(count: int) -> None:
    """Up to eight rows take another kernel than more."""
    check.COUNTS["few"] = [0, count, 0]
    try:
        for dtype in DTYPES:
            check.check_experts(native.experts, dtype, "few", 64, 40)
    finally:
        del check.COUNTS["few"]


def test_a_main_grad_of_another_dtype_or_shape_is_refused() -> None:
    rows, weights = torch.zeros(2, 32).requires_grad_(), check.weights_of(2, 32, 16, torch.float32)
    for main in (torch.zeros(2, 32, 32).bfloat16(), torch.zeros(2, 32, 16)):
        leaves = [x.clone().requires_grad_() for x in weights]
        y = native.experts(rows, *leaves, torch.tensor([1, 1]), main_grad_gate_up_XGC=main)
        with pytest.raises(RuntimeError, match="main_gate_up must be contiguous float32"):
            y.sum().backward()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    counts = torch.tensor([70, 0, 3, 40])
    inputs = [
        check.randn(113, 96, dtype=torch.bfloat16, seed=0),
        *check.weights_of(4, 96, 80, torch.bfloat16),
    ]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = native.experts(*leaves, counts)
            y.backward(check.randn(113, 96, dtype=torch.bfloat16, seed=3))
            found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_row_of_nan_stays_alone() -> None:
    rows, counts = check.randn(24, 32, dtype=torch.bfloat16, seed=0), torch.tensor([12, 12])
    rows[5] = torch.nan
    y = native.experts(rows, *check.weights_of(2, 32, 16, torch.bfloat16), counts)
    assert bool(y[5].isnan().all()) and int(y.isnan().any(1).sum()) == 1


def test_odd_sizes_in_bfloat16_and_mixed_dtypes_are_refused() -> None:
    counts = torch.tensor([1, 1])
    with pytest.raises(RuntimeError, match="odd"):
        native.experts(torch.zeros(2, 3).bfloat16(), *check.weights_of(2, 3, 4, torch.bfloat16), counts)
    with pytest.raises(RuntimeError, match="gate_up is"):
        native.experts(torch.zeros(2, 4).bfloat16(), *check.weights_of(2, 4, 4, torch.float32), counts)


def test_experts_of_odd_sizes_are_refused_in_bfloat16_while_planning() -> None:
    impl = next(impl for _, impl in native_offers.offers() if impl.op == "moe.experts")
    info = DeviceInfo(type="cpu", features=frozenset({"avx512_bf16", "compiler"}))

    def reason(**facts: object) -> str | None:
        return impl.when(info, Need(op="moe.experts", facts=facts))

    assert reason(dtype="bfloat16", hidden_size=64, intermediate_size=32) is None
    assert "intermediate_size 33" in str(reason(dtype="bfloat16", hidden_size=64, intermediate_size=33))
    assert reason(dtype="float32", hidden_size=63, intermediate_size=33) is None
