"""The mixture's and the recurrence's Triton kernels in Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import moe_checks
import pytest
import torch
import triton_interpreted

Check = Callable[..., None]
EXPERTS, DISPATCH = "moe_triton:experts", "moe_triton:dispatch"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def check(interpreter: ProcessPoolExecutor) -> Check:
    """check("module:function", "module:kernel", *arguments), run where Triton interprets."""

    def run(function: str, kernel: str, *args: Any, **rest: Any) -> None:
        interpreter.submit(triton_interpreted.check, function, kernel, *args, **rest).result()

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(32, 16), (34, 22), (130, 70)])
@pytest.mark.parametrize("case", moe_checks.COUNTS)
def test_experts(check: Check, case: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    check("moe_checks:check_experts", EXPERTS, dtype, case, *size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["uneven", "one expert has all", "no rows"])
def test_main_grads(check: Check, case: str, dtype: torch.dtype) -> None:
    check("moe_checks:check_main_grads", EXPERTS, dtype, case, 34, 22)


def test_main_grads_are_not_rounded(check: Check) -> None:
    check("expert_edges:main_grads_are_not_rounded", EXPERTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_single_gradients(check: Check, dtype: torch.dtype) -> None:
    check("moe_checks:check_experts_of_strides", EXPERTS, dtype)
    check("moe_checks:check_gradient_of_few", EXPERTS, dtype)
    kernel = "moe_triton:add_weight_gradient"
    check("expert_edges:main_grads_of_torchs_product", kernel, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", moe_checks.IDS)
def test_dispatch_experts_combine(check: Check, case: str, dtype: torch.dtype) -> None:
    check("expert_edges:layer", DISPATCH, dtype, case)


def test_combine_rounds_once_and_refusals(check: Check) -> None:
    check("expert_edges:rounding", DISPATCH)


@pytest.mark.parametrize("counts", [*moe_checks.COUNTS.values(), [1000], [0, 0, 129, 128, 127, 16, 17]])
@pytest.mark.parametrize("tile_rows", [16, 64, 128])
def test_tiles(check: Check, counts: list[int], tile_rows: int) -> None:
    check("expert_edges:tiles", "moe_triton:schedule", counts, tile_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_delta_step(check: Check, batch: int, dtype: torch.dtype) -> None:
    check("delta_checks:check_step", "delta_triton:step", dtype, batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_conv_step(check: Check, W: int, dtype: torch.dtype) -> None:
    check("delta_checks:check_conv_step", "delta_triton:conv_step", dtype, W)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 8, 4, 6, 20), (17, 8, 8, 8, 16), (1, 24, 64, 16, 130)])
def test_latent_decode(check: Check, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check("expert_edges:generation", "mla_triton:decode", dtype, sizes)
