"""`moe.*`: reference, torch offers and C++ pack of the CPU, by the same checks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import moe_checks as check
import pytest
import torch
from hypothesis import given, settings

from grpo_core.ops.reference import moe as reference
from grpo_cpu import moe
from grpo_cpu.native import compiler, cpu_flags

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NATIVE = pytest.mark.skipif(
    "avx512_bf16" not in cpu_flags() or compiler() is None,
    reason="the C++ pack needs AVX512-BF16 and a compiler",
)


class Offer(NamedTuple):
    dispatch: Callable[..., Any]
    experts: Callable[..., Any]
    combine: Callable[..., Any]

    @property
    def parts(self) -> Any:
        return (self.dispatch, self.experts, self.combine)


def core_reference() -> Offer:
    return Offer(reference.dispatch, reference.experts, reference.combine)


def cpu_torch() -> Offer:
    return Offer(moe.dispatch, moe.experts, moe.combine)


def cpu_native() -> Offer:
    native = importlib.import_module("grpo_cpu.native_moe")
    return Offer(native.dispatch, native.experts, native.combine)


def reference_route() -> Callable[..., Any]:
    return reference.route


def native_route() -> Callable[..., Any]:
    route: Callable[..., Any] = importlib.import_module("grpo_cpu.native_moe").route
    return route


WIDE = (core_reference, cpu_torch)
DTYPED = [
    *((make, dtype) for make in WIDE for dtype in DTYPES),
    *(pytest.param(cpu_native, dtype, marks=NATIVE) for dtype in DTYPES[1:]),
]
dtyped = pytest.mark.parametrize(("make", "dtype"), DTYPED)
narrow = pytest.mark.parametrize(("make", "dtype"), [one for one in DTYPED if torch.float64 not in one])
routed = pytest.mark.parametrize("make", [reference_route, pytest.param(native_route, marks=NATIVE)])


@routed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", check.ROUTES)
@pytest.mark.parametrize("T", [0, 1, 9])
def test_route(
    make: Callable[[], Any], T: int, case: tuple[int, int, int], norm: bool, score: str, dtype: torch.dtype
) -> None:
    check.check_routes(make(), T, case, norm=norm, score=score, dtype=dtype)


@routed
@settings(derandomize=True, deadline=None, max_examples=150)
@given(check.routes())
def test_route_with_ties_and_replayed_rows(
    make: Callable[[], Any], case: tuple[torch.Tensor, dict[str, Any]]
) -> None:
    check.check_route(make(), case[0], **case[1])


@routed
def test_route_at_the_ends_of_the_range_and_refusals(make: Callable[[], Any]) -> None:
    check.check_route_at_the_ends(make())
    check.check_route_refusals(make())


@dtyped
@pytest.mark.parametrize("size", check.SIZES)
@pytest.mark.parametrize("case", check.COUNTS)
def test_experts(make: Callable[[], Offer], case: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    check.check_experts(make().experts, dtype, case, *size)


@dtyped
@pytest.mark.parametrize("case", check.IDS)
def test_dispatch_experts_combine(make: Callable[[], Offer], case: str, dtype: torch.dtype) -> None:
    check.check_layer(make().parts, dtype, check.IDS[case])


@narrow
def test_strides_and_single_gradients(make: Callable[[], Offer], dtype: torch.dtype) -> None:
    check.check_experts_of_strides(make().experts, dtype)
    check.check_gradient_of_few(make().experts, dtype)


@narrow
@pytest.mark.parametrize("case", ["uneven", "no rows", "more rows than are summed at a time"])
def test_main_grads_take_the_gradients_of_weights(
    make: Callable[[], Offer], case: str, dtype: torch.dtype
) -> None:
    for size in check.SIZES[1:3]:
        check.check_main_grads(make().experts, dtype, case, *size)


@pytest.mark.parametrize("make", [*WIDE, pytest.param(cpu_native, marks=NATIVE)])
def test_combine_rounds_once_and_refusals(make: Callable[[], Offer]) -> None:
    offer = make()
    check.check_combine_rounds_once(offer.dispatch, offer.combine)
    check.check_refusals(offer.dispatch, offer.experts)
