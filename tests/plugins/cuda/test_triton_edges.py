"""The Triton kernels at the edges of their tiles, in Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import triton_interpreted

Check = Callable[..., None]
LOGPROB = "triton_logprob:logprob"
ADAMW = "triton_adamw:adamw"
SAMPLE = "triton_sample:sample_token"


@pytest.fixture
def check(interpreter: ProcessPoolExecutor) -> Check:
    """check("module:function", "module:kernel", *arguments), run where Triton interprets."""

    def run(function: str, kernel: str, *args: Any) -> None:
        name = function if ":" in function else f"triton_edges:{function}"
        interpreter.submit(triton_interpreted.check, name, kernel, *args).result()

    return run


@pytest.mark.parametrize("size", [1, 127, 128, 129, 2047, 2049])
@pytest.mark.parametrize("rows", [1, 19])
def test_norm(check: Check, rows: int, size: int) -> None:
    check("norm", "triton_norm:rms_norm", rows, size)


def test_norm_of_more_rows_than_programs(check: Check) -> None:
    check("norm_of_many_rows", "triton_norm:rms_norm")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head", "pairs"), [(2, 1), (7, 3), (65, 32), (66, 33), (300, 65)])
def test_rope(check: Check, head: int, pairs: int, interleaved: bool) -> None:
    check("rope", "triton_rope:rope_apply", head, pairs, interleaved)


@pytest.mark.parametrize("size", [1, 255, 257, 1023, 1025, 2560])
@pytest.mark.parametrize("rows", [1, 7])
def test_swiglu(check: Check, rows: int, size: int) -> None:
    check("swiglu", "triton_swiglu:swiglu", rows, size)


@pytest.mark.parametrize(
    ("T", "V", "C"), [(1, 1, 1), (1, 129, 65), (127, 128, 64), (129, 127, 63), (2, 4095, 8), (3, 4097, 17)]
)
def test_logprob(check: Check, T: int, V: int, C: int) -> None:
    check("logprob", LOGPROB, T, V, C)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_in_pieces(check: Check, dtype: torch.dtype) -> None:
    check("logprob_in_pieces", LOGPROB, dtype)


def test_logprob_of_extreme_logits(check: Check) -> None:
    check("extreme_logits", LOGPROB)


def test_small_gradients_do_not_vanish_in_float16(check: Check) -> None:
    check("small_gradients_in_float16", LOGPROB)


def test_logprob_over_a_split_vocabulary(check: Check) -> None:
    check("split_vocabulary", LOGPROB)


def test_logprob_refuses(check: Check) -> None:
    check("op_checks:check_logprob_refuses", LOGPROB)


@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
@pytest.mark.parametrize("kernel", [ADAMW, "adamw:adamw"])
def test_adamw(check: Check, kernel: str, grad_scale: float) -> None:
    check("op_checks:check_adamw", kernel, grad_scale)


@pytest.mark.parametrize("kernel", [ADAMW, "adamw:adamw"])
def test_adamw_of_odd_tensors(check: Check, kernel: str) -> None:
    check("adamw", kernel)


def test_adamw_refuses(check: Check) -> None:
    check("adamw_refuses", ADAMW)


@pytest.mark.parametrize(
    ("vocab", "dtype", "filters"),
    [
        (2, torch.float32, (1, 0.5, 0.5)),
        (300, torch.bfloat16, (0, 1.0, 0.0)),
        (300, torch.bfloat16, (7, 1.0, 0.0)),
        (300, torch.float32, (40, 0.9, 0.02)),
        (4097, torch.float16, (0, 0.8, 0.0)),
        (4097, torch.bfloat16, (0, 1.0, 0.05)),
    ],
)
def test_draws_invert_the_filtered_distribution(
    check: Check, vocab: int, dtype: torch.dtype, filters: tuple[int, float, float]
) -> None:
    check("sample_checks:check_inverse_of_the_distribution", SAMPLE, vocab, dtype, 0.6, *filters)


@pytest.mark.parametrize("function", ["edges", "infinities", "rows_of_different_kinds"])
def test_draws(check: Check, function: str) -> None:
    check(f"sample_checks:check_{function}", SAMPLE)
