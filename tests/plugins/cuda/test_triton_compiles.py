"""Each Triton kernel compiles for real GPUs, within their shared memory and registers, for matrix units."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton_compiled

from grpo_cuda import triton_blocks as blocks

SHORT = {"*bf16": "bfloat16", "*fp16": "float16", "*fp32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel with the types of its arguments, where X stands for the dtype asked about."""

    name: str
    types: str
    constants: dict[str, Any]
    product: bool = False
    logits: bool = False
    """Whether the product's tile is one of logits."""
    warps: int = 4


_NORM, _ROPE, _GATES = blocks.norm_tile(4096), blocks.rope_tile(64, 0), blocks.swiglu_tile(11008)
_NORMS = {"CENTRED": True, "ROWS": _NORM.rows, "COLUMNS": _NORM.columns, "ADD": True}
_ROPES = {"INTERLEAVED": False, "BACK": True, "ROWS": _ROPE.rows, "PAIRS": _ROPE.columns, "REST": 0}
_TILES = {"ROWS": _GATES.rows, "COLUMNS": _GATES.columns}
_FACTORS = "X X *fp32 *fp32" + 6 * " i32" + " fp32"
KERNELS = [
    Kernel(name="triton_norm:norm_kernel", types="X X X X X *fp32 i32 i32 i32 i32 fp32", constants=_NORMS,
           warps=_NORM.warps),
    Kernel(name="triton_norm:norm_backward_kernel", types="X X X X *fp32 X *fp32 i32 i32 i32 i32",
           constants={**_NORMS, "WEIGHT": True}, warps=_NORM.warps),
    Kernel(name="triton_rope:rope_kernel", types="X X X X *fp32 *fp32" + 10 * " i32", constants=_ROPES),
    Kernel(name="triton_swiglu:swiglu_kernel", types="X X i32 i32 i32", constants=_TILES),
    Kernel(name="triton_swiglu:swiglu_backward_kernel", types="X X X i32 i32 i32", constants=_TILES),
    Kernel(name="triton_logprob_kernels:statistics_kernel",
           types="X X *i64 *fp32 *fp32 *fp32 *fp32" + 5 * " i32" + " fp32", constants={"SPLIT": blocks.SPLIT},
           product=True, logits=True),
    Kernel(name="triton_logprob_kernels:slopes_kernel",
           types="X X *i64" + 6 * " *fp32" + " X" + 8 * " i32" + " fp32", constants={"SCALED": True},
           product=True, logits=True),
    Kernel(name="triton_product:product_kernel", types=_FACTORS, product=True,
           constants={"ADD": True, "SCALED": True, "GROUP": 8, "stride_am": 1}),
    Kernel(name="triton_product:product_kernel", types=_FACTORS, product=True,
           constants={"ADD": False, "SCALED": False, "GROUP": 8, "stride_ak": 1}),
    Kernel(name="triton_sample:sums_kernel", types="X *fp32 *fp32 *fp32 *fp32 *i64 i32 i32 i32",
           constants={"PIECE": 4096}),
    Kernel(name="triton_sample:pick_kernel", types="X *fp32 *fp32 *i64 *fp64 *i64 i32 i32",
           constants={"PIECE": 4096}),
]  # fmt: skip
COMPILED = [(80, "*bf16"), (90, "*bf16"), (90, "*fp32")]
LATER = [(86, "*bf16"), (89, "*fp16"), (100, "*bf16"), (120, "*bf16"), (120, "*fp16"), (80, "*fp32")]


def compiled(kernel: Kernel, dtype: str, capability: int, folder: Path) -> triton_compiled.Compiled:
    """With the tiles that the plugin takes."""
    module, _, name = kernel.name.partition(":")
    function = getattr(importlib.import_module(f"grpo_cuda.{module}"), name)
    constants, warps, stages = dict(kernel.constants), kernel.warps, 3
    if kernel.product:
        short = SHORT[dtype]
        tile = blocks.logits_tile(short, capability) if kernel.logits else blocks.product_tile(short)
        constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "EVEN": True,
                      "PRECISION": tile.precision}  # fmt: skip
        warps, stages = tile.warps, tile.stages
    return triton_compiled.compiled(
        function, kernel.types.replace("X", dtype), constants, capability=capability, warps=warps,
        stages=stages, folder=folder,
    )  # fmt: skip


def check(kernel: Kernel, dtype: str, capability: int, folder: Path) -> None:
    made = compiled(kernel, dtype, capability, folder)
    assert made.shared <= triton_compiled.SHARED[capability] * 1024
    assert made.stack == 0, f"{made.stack} bytes of registers are spilled"
    assert 32 * kernel.warps * made.registers <= 65536
    assert "tf32" not in made.ptx
    if kernel.product and dtype != "*fp32":
        assert ("wgmma" if capability == 90 else "mma.sync" if capability < 90 else "mma") in made.ptx


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize(("capability", "dtype"), COMPILED)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.partition(":")[2])
def test_compiles(kernel: Kernel, dtype: str, capability: int, tmp_path: Path) -> None:
    check(kernel, dtype, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), LATER)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.partition(":")[2])
def test_compiles_for_other_gpus(kernel: Kernel, dtype: str, capability: int, tmp_path: Path) -> None:
    check(kernel, dtype, capability, tmp_path)


@pytest.mark.parametrize("copy", [None, "bfloat16"])
def test_the_optimizer_compiles(copy: str | None, tmp_path: Path) -> None:
    import triton.language as tl

    from grpo_cuda import triton_adamw

    constants = {"COPY": getattr(tl, copy) if copy else None, "ALIGNED": True,
                 "PIECE": triton_adamw.PIECE, "BLOCK": triton_adamw.BLOCK}  # fmt: skip
    made = triton_compiled.compiled(
        triton_adamw.step_kernel, "*i64 *fp32 *i32 *i32 *i64" + 8 * " fp32", constants, capability=90,
        warps=4, stages=3, folder=tmp_path,
    )  # fmt: skip
    assert made.stack == 0
    # The addresses' alignment is known: four parameters of a thread are loaded at once.
    assert "ld.global.v4" in made.ptx
