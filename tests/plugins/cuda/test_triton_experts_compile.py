"""The mixture's and the recurrence's kernels compile for real GPUs, within their memory and registers."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import triton_compiled
from triton_compiled import SHARED

from grpo_cuda.triton_blocks import product_tile

NAMES = {"*bf16": "bfloat16", "*fp32": "float32"}
TARGETS = [
    (90, "*bf16"),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((80, "*bf16"), (86, "*bf16"), (90, "*fp32"))),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def check(
    kernel: str, types: str, constants: dict[str, Any], capability: int, folder: Path, *, warps: int = 4,
    stages: int = 3,
) -> str:  # fmt: skip
    """Nothing is spilled, and shared memory and registers suffice; the code, as text."""
    module, _, name = kernel.partition(":")
    function = getattr(importlib.import_module(f"grpo_cuda.{module}"), name)
    made = triton_compiled.compiled(
        function, types, constants, capability=capability, warps=warps, stages=stages, folder=folder
    )
    assert made.shared <= SHARED[capability] * 1024
    assert made.stack == 0, f"{made.stack} bytes of registers are spilled"
    assert 32 * warps * made.registers <= 65536
    return str(made.ptx)


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("rows", [16, 128])
def test_products(rows: int, capability: int, dtype: str, tmp_path: Path) -> None:
    tile = product_tile(NAMES[dtype])
    rest = {"warps": tile.warps, "stages": tile.stages}
    common = {"COLUMNS": tile.columns, "DEPTH": tile.depth, "PRECISION": tile.precision}
    types = f"{dtype} {dtype} {dtype} *i32 *i32 *i32" + 6 * " i32"
    # Rows of x and of the weight as the contract has them: the last stride is 1.
    for unit in ("w_depth", "w_column"):
        constants = {**common, "ROWS": min(rows, tile.rows), "x_depth": 1, unit: 1}
        ptx = check("moe_triton_kernels:rows_kernel", types, constants, capability, tmp_path, **rest)
        assert "tf32" not in ptx and (dtype == "*fp32" or "mma" in ptx)
    if rows == 16:
        return
    types = f"{dtype} {dtype} {dtype} *i32" + 6 * " i32"
    for add in (False, True):
        constants = {**common, "ROWS": tile.rows, "ADD": add, "g_column": 1, "x_column": 1}
        written = types if not add else f"{dtype} {dtype} *fp32 *i32" + 6 * " i32"
        ptx = check("moe_triton_kernels:weights_kernel", written, constants, capability, tmp_path, **rest)
        assert "tf32" not in ptx and (dtype == "*fp32" or "mma" in ptx)


@pytest.mark.parametrize(("capability", "dtype"), [(80, "*bf16"), (90, "*fp32")])
def test_what_moves_memory(capability: int, dtype: str, tmp_path: Path) -> None:
    check("moe_triton_kernels:weigh_kernel", f"{dtype} *fp32 *i64 {dtype} i32 i32",
          {"WEIGHTED": True, "COLUMNS": 1024}, capability, tmp_path)  # fmt: skip
    check("moe_triton_kernels:slopes_kernel", f"{dtype} {dtype} *fp32 *i64 {dtype} *fp32 i32 i32",
          {"OF_ROWS": True, "OF_WEIGHTS": True, "COLUMNS": 1024}, capability, tmp_path)  # fmt: skip
    heads = f"{dtype} {dtype} {dtype} *fp32 *fp32 *fp32 *i64 {dtype} fp32 i32 i32 i32 i32"
    for D, E in ((128, 64), (256, 32)):
        check("delta_triton:step_kernel", heads, {"ROWS": D, "COLUMNS": E}, capability, tmp_path)
    check("delta_triton:conv_step_kernel", f"{dtype} {dtype} {dtype} *i64 {dtype} i32",
          {"W": 4, "COLUMNS": 512}, capability, tmp_path)  # fmt: skip


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
def test_latent_decode(capability: int, dtype: str, tmp_path: Path) -> None:
    """At DeepSeek's sizes, the largest of the offer."""
    wide = dtype == "*fp32"
    constants = {"L": 512, "R": 64, "PAGE": 64, "HEADS": 16, "L2": 512, "R2": 64, "TILE": 16 if wide else 32,
                 "SPAN": 512, "PRECISION": "ieee" if wide else "tf32"}  # fmt: skip
    types = f"{dtype} {dtype} *i32 *i32 *fp32 *fp32 *fp32 fp32 i32 i32 i32 i32"
    ptx = check("mla_triton:latent_kernel", types, constants, capability, tmp_path, stages=1 if wide else 2)
    assert "tf32" not in ptx
