"""The Triton decode over pages: in Triton's interpreter against float64, and compiled for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import paged_edges
import pytest
import torch
import triton_compiled
import triton_interpreted

from grpo_cuda.cache import SmallPageCache

Check = Callable[..., None]


@pytest.fixture
def check(interpreter: ProcessPoolExecutor) -> Check:
    """check("function", *arguments) of `paged_edges`, run where Triton interprets."""

    def run(function: str, *args: Any) -> None:
        name = f"paged_edges:{function}"
        interpreter.submit(triton_interpreted.check, name, "cache_decode:decode", *args).result()

    return run


def test_the_life_of_a_cache_in_small_pages() -> None:
    paged_edges.life(SmallPageCache)


@pytest.mark.parametrize(("kind", "dtype"), [("small", torch.float32), ("large", torch.bfloat16)])
def test_generation(check: Check, kind: str, dtype: torch.dtype) -> None:
    check("generation", kind, dtype)


@pytest.mark.parametrize(
    ("kind", "heads", "sizes", "window"),
    [
        ("small", (2, 1), (16, 16), None),
        ("large", (3, 3), (24, 16), 70),
        ("small", (20, 1), (8, 40), 600),
    ],
)  # fmt: skip
def test_spans(
    check: Check, kind: str, heads: tuple[int, int], sizes: tuple[int, int], window: int | None
) -> None:
    check("spans", kind, heads, sizes, window)


def test_what_is_not_written_is_not_seen(check: Check) -> None:
    check("unwritten")
    check("refusals")


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*bf16"), (90, "*bf16"), (120, "*fp32")])
def test_it_compiles_within_a_gpus_registers(capability: int, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from grpo_cuda import cache_decode

    wide = dtype == "*fp32"
    constants = {
        "D": 128, "E": 128, "PAGE": 16, "ROWS": 16, "D2": 128, "E2": 128, "TILE": 32 if wide else 64,
        "SPAN": cache_decode.SPAN, "PRECISION": "ieee" if wide else "tf32",
    }  # fmt: skip
    types = f"{dtype} {dtype} {dtype} *i32 *i32 *fp32 *fp32 *fp32 fp32" + 10 * " i32"
    made = triton_compiled.compiled(
        cache_decode.decode_kernel,
        types,
        constants,
        capability=capability,
        warps=4,
        stages=3,
        folder=tmp_path,
    )
    assert made.shared <= triton_compiled.SHARED[capability] << 10
    assert made.stack == 0 and made.registers <= 255
    assert wide or "mma" in made.ptx
    made = triton_compiled.compiled(
        cache_decode.combine_kernel, f"*fp32 *fp32 *fp32 {dtype} i32", {"E": 128, "E2": 128},
        capability=capability, warps=1, stages=3, folder=tmp_path,
    )  # fmt: skip
    assert made.stack == 0
