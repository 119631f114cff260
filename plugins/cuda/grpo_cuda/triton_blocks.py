"""Sizes of the tiles that the Triton kernels work in: pure functions of a problem's shape and dtype.

Tiles never depend on how many rows a call has, so that the bits of a row do not either, and nothing is
autotuned: a choice by the clock would change bits from run to run. Imports neither torch nor triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

THREADS = 32
"""Of a warp."""
WIDEST = 32768
"""Longest row that one program of a norm keeps in registers."""
ELEMENTS = 1 << 27
"""Slopes of logits alive at once in a backward pass: 256 MiB in bfloat16."""
TOKENS = 1 << 14
"""Tokens of a backward pass's chunk: more would leave too narrow a piece of the vocabulary."""
SPLIT = 4096
"""Columns of the vocabulary that one program of the log-prob's forward pass sums up: with the features of a
usual model they fit the second-level cache, where all programs of the same columns find them."""
STRIPES = 256
"""Programs of the norm's backward pass; each adds up the weight's gradient of its own rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTile:
    """A tile of whole or partial rows, for kernels that move memory."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductTile:
    """A tile of a matrix product: rows x columns of the result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    precision: str
    """Of `tl.dot`: float32 operands must not be rounded to TF32."""

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the operands in flight."""
        return self.stages * (self.rows + self.columns) * self.depth * itemsize


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def norm_tile(hidden_size: int) -> RowTile:
    """Whole rows; 16 elements for each thread until all 32 warps of a program are in use."""
    columns = power_of_two(hidden_size)
    rows = max(1, 2048 // columns)
    return RowTile(rows=rows, columns=columns, warps=min(32, max(4, rows * columns // 512)))


def stripe(rows: int, tile_rows: int) -> int:
    """Rows of one program of the norm's backward pass, a multiple of its tile's."""
    tiles = -(-rows // tile_rows)
    return -(-tiles // STRIPES) * tile_rows


def rope_tile(pairs: int, rest: int) -> RowTile:
    """Heads x pairs; `rest` is what of a head is not turned. `columns` are pairs."""
    widest = power_of_two(max(pairs, rest, 1))
    return RowTile(rows=max(1, 2048 // widest), columns=power_of_two(pairs), warps=4)


def swiglu_tile(intermediate_size: int) -> RowTile:
    """The widest piece of a row that wastes little at the row's end; 8 elements for each thread."""
    fitting = min(1024, power_of_two(intermediate_size))
    widths = [width for width in (1024, 512, 256) if width <= fitting] or [fitting]
    padded = {width: -(-intermediate_size // width) * width for width in widths}
    columns = next(
        (w for w in widths if padded[w] <= 1.1 * intermediate_size), min(padded, key=padded.__getitem__)
    )
    return RowTile(rows=max(1, 1024 // columns), columns=columns, warps=4)


def product_tile(dtype: str) -> ProductTile:
    """For products of a dtype by its short name. 96 KiB of shared memory at most: GPUs of capability 8.6 and
    8.9 have 99 for a program."""
    if dtype == "float32":
        return ProductTile(rows=64, columns=64, depth=32, warps=4, stages=2, precision="ieee")
    return ProductTile(rows=128, columns=128, depth=64, warps=8, stages=3, precision="tf32")


def logits_tile(dtype: str, capability: int) -> ProductTile:
    """For logits that are used in registers: as `product_tile`, but half as deep on capability 12.0, where
    the statistics of log-probs spill registers otherwise. Sums have the same order in both."""
    tile = product_tile(dtype)
    shallow = capability >= 120 and tile.depth == 64
    return replace(tile, depth=32, stages=tile.stages + 1) if shallow else tile


def logprob_chunks(
    tokens: int, vocab: int, *, elements: int = ELEMENTS, most_tokens: int = TOKENS, step: int = 128
) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """Chunks of tokens, each with the pieces of the vocabulary whose slopes are made at once."""
    size = min(tokens, most_tokens)
    width = max(elements // max(size, 1) // step, 1) * step
    pieces = tuple(slice(at, min(at + width, vocab)) for at in range(0, vocab, width))
    for start in range(0, tokens, max(size, 1)):
        yield slice(start, min(start + size, tokens)), pieces
