"""The plugin's smaller ops and its experts over the vendor's documented formulas, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import moe_checks
import npu_formulas
import op_checks
import pytest
import sample_checks
import torch

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("count", [0, 1, 6])
def test_rms_norm(
    ascend: SimpleNamespace, count: int, residual: bool, zero_centered: bool, dtype: torch.dtype
) -> None:
    op_checks.check_rms_norm(ascend.norm.rms_norm, dtype, count, zero_centered, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [6, 4])
def test_rope(ascend: SimpleNamespace, pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    op_checks.check_rope(ascend.rope.rope_apply, dtype, interleaved, pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(ascend: SimpleNamespace, dtype: torch.dtype) -> None:
    op_checks.check_swiglu(ascend.mlp.swiglu, dtype)


@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
def test_adamw(ascend: SimpleNamespace, grad_scale: float) -> None:
    op_checks.check_adamw(ascend.adamw.adamw, grad_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", moe_checks.COUNTS)
def test_experts(ascend: SimpleNamespace, case: str, dtype: torch.dtype) -> None:
    moe_checks.check_experts(ascend.moe.experts, dtype, case, 34, 22)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", moe_checks.IDS)
def test_dispatch_experts_combine(ascend: SimpleNamespace, case: str, dtype: torch.dtype) -> None:
    parts = (ascend.moe.dispatch, ascend.moe.experts, ascend.moe.combine)
    moe_checks.check_layer(parts, dtype, moe_checks.IDS[case])


def test_gradients_of_few_and_rounding(ascend: SimpleNamespace) -> None:
    moe_checks.check_gradient_of_few(ascend.moe.experts, torch.float32)
    moe_checks.check_combine_rounds_once(ascend.moe.dispatch, ascend.moe.combine)


def test_the_vendors_grouped_product_alone_would_lose_its_gradients(ascend: SimpleNamespace) -> None:
    x = torch.ones(3, 4, requires_grad=True)
    w, counts = torch.ones(2, 5, 4, requires_grad=True), torch.tensor([1, 2])
    (bare,) = npu_formulas.npu_grouped_matmul(
        [x], [w.transpose(1, 2)], group_list=counts, split_item=2, group_type=0, group_list_type=1
    )
    assert not bare.requires_grad
    ascend.grouped.grouped_linear(x, w, counts).sum().backward()
    assert x.grad is not None and w.grad is not None and w.grad[1].eq(2).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", moe_checks.ROUTES)
def test_route(ascend: SimpleNamespace, case: tuple[int, int, int], norm: bool, score: str) -> None:
    for tokens in (0, 5):
        moe_checks.check_routes(ascend.moe.route, tokens, case, norm=norm, score=score, dtype=torch.float32)


def test_route_refusals(ascend: SimpleNamespace) -> None:
    moe_checks.check_route_refusals(ascend.moe.route)


@pytest.mark.parametrize("V", [1, 255, 257, 3000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sample_without_filters(ascend: SimpleNamespace, V: int, temperature: float) -> None:
    sample_checks.check_inverse_of_the_distribution(
        ascend.sample.sample_token, V, torch.float32, temperature, 0, 1.0, 0.0
    )


def test_sample(ascend: SimpleNamespace) -> None:
    impl = ascend.sample.sample_token
    sample_checks.check_inverse_of_the_distribution(impl, 300, torch.float32, 0.7, 20, 0.9, 0.02)
    for check in (sample_checks.check_frequencies, sample_checks.check_edges, sample_checks.check_infinities,
                  sample_checks.check_rows_of_different_kinds):  # fmt: skip
        check(impl)
