"""Matrix products that add to float32 in Triton: gradients of weights, and sums over pieces.

Work: 2 M N K operations on matrix units with float32 sums (float32 operands without TF32). Memory: a is read
ceil(N / COLUMNS) times and b ceil(M / ROWS) times, mostly from the second-level cache; out is written once,
and read once where it is added to. Each tile of out has one program and one order of sums: equal bits from
equal inputs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import ProductTile, product_tile

GROUP = 8
"""Rows of tiles that programs walk at a time."""


def short_name(x: Tensor) -> str:
    """A tensor's dtype as offers write it."""
    return str(x.dtype).removeprefix("torch.")


def dense_rows(x: Tensor) -> Tensor:
    """The same tensor, or a copy where its last dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sizes(tile: ProductTile, depth: int) -> dict[str, Any]:
    """Constants and launch options of a kernel whose products sum over `depth`."""
    return {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "EVEN": depth % tile.depth == 0,
        "PRECISION": tile.precision, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def add_product(
    a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, *, add: bool, factor: float = 1.0, scale: Tensor | None = None
) -> None:
    """out (+)= factor a b / scale, in place. a has any strides, rows of b and out are dense; scale is [1]."""
    (M, K), N = a_MK.shape, b_KN.shape[1]
    tile = product_tile(short_name(a_MK))
    product_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        a_MK, b_KN, out_MN, out_MN if scale is None else scale, M, N, K, a_MK.stride(0), a_MK.stride(1),
        b_KN.stride(0), out_MN.stride(0), factor, ADD=add, SCALED=scale is not None, GROUP=GROUP,
        **sizes(tile, K),
    )  # fmt: skip


@triton.jit
def product_kernel(
    a, b, out, scale, M, N, K, stride_am, stride_ak, stride_bk, stride_om, factor,
    ADD: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of out (+)= factor a b, summed in float32 by one program; over `scale` where SCALED.

    Programs walk GROUP rows of tiles at a time, so that tiles of b are found in cache. EVEN says that DEPTH
    divides K. The rows of b and out are dense.
    """
    program = tl.program_id(0)
    row_tiles, column_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    group = program // (GROUP * column_tiles)
    height = min(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    m = (group * GROUP + within % height) * ROWS + tl.arange(0, ROWS)
    n = (within // height) * COLUMNS + tl.arange(0, COLUMNS)
    rows = a + m.to(tl.int64)[:, None] * stride_am
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, DEPTH):
        k = start + tl.arange(0, DEPTH)
        have_m, have_n = (m < M)[:, None], (n < N)[None, :]
        if not EVEN:
            have_m, have_n = have_m & (k < K)[None, :], have_n & (k < K)[:, None]
        x = tl.load(rows + k.to(tl.int64)[None, :] * stride_ak, mask=have_m, other=0.0)
        y = tl.load(b + k.to(tl.int64)[:, None] * stride_bk + n[None, :], mask=have_n, other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    if SCALED:
        factor = factor / tl.load(scale)
    total *= factor
    at = out + m.to(tl.int64)[:, None] * stride_om + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)
