"""A mixture of experts on the CUDA plugin: torch's forms as they are, Transformer Engine by its formulas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import expert_formulas as vendor
import moe_checks as check
import pytest
import torch
from hypothesis import given, settings

from grpo_cuda import moe, moe_grouped

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
HALF_AND_FLOAT = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def engine() -> ModuleType:
    loaded: ModuleType = vendor.adapters("moe_te").moe_te
    return loaded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", check.ROUTES)
def test_route(case: tuple[int, int, int], norm: bool, score: str, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 5):
        check.check_routes(moe.route, tokens, case, norm=norm, score=score, dtype=dtype)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(check.routes())
def test_ties_go_to_the_lowest_id_and_replays_are_taken(
    question: tuple[torch.Tensor, dict[str, Any]],
) -> None:
    logits, changes = question
    check.check_route(moe.route, logits, **changes)


def test_route_at_the_ends_and_refusals() -> None:
    check.check_route_at_the_ends(moe.route)
    check.check_route_refusals(moe.route)


def test_an_expert_that_a_replay_names_twice_keeps_both_gradients() -> None:
    logits = torch.zeros(1, 4, requires_grad=True)
    fixed = {**check.FREE, "top_k": 2, "norm": False, "ids_Tk": torch.tensor([[2, 2]])}
    weights, _ = moe.route(logits, **fixed)
    (weights * torch.tensor([[1.0, 3.0]])).sum().backward()
    # The slope of a sigmoid at 0 is a quarter.
    assert logits.grad.tolist() == [[0, 0, 1.0, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", check.SIZES)
@pytest.mark.parametrize("case", check.COUNTS)
def test_experts_in_a_loop(case: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    check.check_experts(moe.experts, dtype, case, *size)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("size", [size for size in check.SIZES if size != (34, 22)])
@pytest.mark.parametrize("case", check.COUNTS)
def test_experts_in_torchs_grouped_product(case: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    """On a CPU, torch takes each group's product in turn; layouts are held to the same rules there."""
    check.check_experts(moe_grouped.experts, dtype, case, *size)


def test_torchs_grouped_product_refuses_rows_of_a_few_bytes() -> None:
    """Why the offer's limits want multiples of 8."""
    with pytest.raises(RuntimeError, match="16 bytes"):
        check.check_experts(moe_grouped.experts, torch.bfloat16, "uneven", 34, 22)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("case", check.COUNTS)
def test_experts_in_transformer_engine(engine: ModuleType, case: str, dtype: torch.dtype) -> None:
    check.check_experts(engine.experts, dtype, case, 64, 48)


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("case", ["uneven", "one expert has all", "no rows"])
def test_main_grads(engine: ModuleType, case: str, dtype: torch.dtype) -> None:
    check.check_main_grads(moe.experts, dtype, case, 64, 48)
    check.check_main_grads(engine.experts, dtype, case, 64, 48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.IDS)
def test_dispatch_experts_combine(case: str, dtype: torch.dtype) -> None:
    check.check_layer((moe.dispatch, moe.experts, moe.combine), dtype, check.IDS[case])


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
@pytest.mark.parametrize("case", check.IDS)
def test_the_same_in_transformer_engine(engine: ModuleType, case: str, dtype: torch.dtype) -> None:
    check.check_layer((engine.dispatch, engine.experts, engine.combine), dtype, check.IDS[case])


@pytest.mark.parametrize("dtype", HALF_AND_FLOAT)
def test_strides_single_gradients_and_rounding(engine: ModuleType, dtype: torch.dtype) -> None:
    for experts in (moe.experts, moe_grouped.experts, engine.experts):
        check.check_experts_of_strides(experts, dtype)
        check.check_gradient_of_few(experts, dtype)
    for module in (moe, engine):
        check.check_combine_rounds_once(module.dispatch, module.combine)
        check.check_refusals(module.dispatch, module.experts)


def test_records_of_another_dispatch_are_refused(engine: ModuleType) -> None:
    x, ids, weights = torch.zeros(2, 8), torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2)
    for one, other in ((moe, engine), (engine, moe)):
        rows, _, record = one.dispatch(x, ids, num_experts=3, group=None)
        with pytest.raises(TypeError, match="record"):
            other.combine(rows, weights, record)


def test_transformer_engine_makes_one_shell_for_each_size(engine: ModuleType) -> None:
    vendor.CALLS.clear()
    check.check_experts(engine.experts, torch.float32, "uneven", 32, 16)
    before = engine._shell.cache_info().misses
    check.check_experts(engine.experts, torch.float32, "one row", 32, 16)
    assert engine._shell.cache_info().misses == before
    assert all(isinstance(call["m_splits"], list) for _, call in vendor.CALLS)
