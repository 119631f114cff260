"""Sizes of tiles as pure functions of a problem."""

from __future__ import annotations

import pytest

from grpo_cuda import triton_blocks as blocks

LEAST_SHARED = 99 * 1024
"""Bytes that a program may have on GPUs of compute capability 8.6, 8.9 and 12.0; the others have more."""


@pytest.mark.parametrize(("size", "wanted"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (32768, 32768)])
def test_power_of_two(size: int, wanted: int) -> None:
    assert blocks.power_of_two(size) == wanted


@pytest.mark.parametrize("size", [1, 64, 100, 128, 576, 1024, 4096, 5120, 8192, 32768])
def test_a_norms_tile_holds_whole_rows_in_registers(size: int) -> None:
    tile = blocks.norm_tile(size)
    assert size <= tile.columns < 2 * size and 4 <= tile.warps <= 32
    # float32 values of a tile take at most 32 of a thread's 255 registers.
    assert tile.rows * tile.columns <= 32 * 32 * tile.warps


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 255, 256, 257, 100_000])
@pytest.mark.parametrize("height", [1, 4, 16])
def test_stripes_cover_all_rows_in_few_programs(rows: int, height: int) -> None:
    stripe = blocks.stripe(rows, height)
    assert stripe % height == 0 and -(-rows // stripe) <= blocks.STRIPES


@pytest.mark.parametrize(("pairs", "rest"), [(1, 0), (32, 0), (32, 64), (16, 224), (512, 0), (64, 1)])
def test_a_rotary_tile(pairs: int, rest: int) -> None:
    tile = blocks.rope_tile(pairs, rest)
    assert tile.columns >= pairs and tile.rows >= 1
    assert tile.rows * max(tile.columns, blocks.power_of_two(rest)) <= 2048


@pytest.mark.parametrize("size", [1, 7, 255, 256, 768, 1536, 4864, 8960, 11008, 14336, 18944])
def test_a_swiglu_tile_wastes_little_of_a_row(size: int) -> None:
    tile = blocks.swiglu_tile(size)
    padded = -(-size // tile.columns) * tile.columns
    assert tile.rows * tile.columns <= 1024
    assert size < 1024 or padded <= 1.15 * size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_products_tile_fits_every_gpu_of_8_0_and_later(dtype: str) -> None:
    tile = blocks.product_tile(dtype)
    assert tile.shared_bytes(4 if dtype == "float32" else 2) <= LEAST_SHARED
    assert blocks.SPLIT % tile.columns == 0
    assert (tile.precision == "ieee") == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_logits_tiles_differ_in_depth_alone(dtype: str) -> None:
    plain, later = blocks.logits_tile(dtype, 90), blocks.logits_tile(dtype, 120)
    assert plain == blocks.product_tile(dtype) and later.depth == 32
    assert (later.rows, later.columns, later.warps) == (plain.rows, plain.columns, plain.warps)
    assert later.shared_bytes(2) <= plain.shared_bytes(2)


@pytest.mark.parametrize(
    ("tokens", "vocab"), [(0, 10), (1, 1), (100, 151_936), (16_384, 151_936), (100_000, 32_000)]
)
def test_chunks_cover_every_logit_once_within_the_budget(tokens: int, vocab: int) -> None:
    covered, before = 0, 0
    for rows, pieces in blocks.logprob_chunks(tokens, vocab):
        assert rows.start == before and rows.stop - rows.start <= blocks.TOKENS
        before, end = rows.stop, 0
        for piece in pieces:
            assert piece.start == end and piece.start % 128 == 0
            end, width = piece.stop, piece.stop - piece.start
            assert width * (rows.stop - rows.start) <= blocks.ELEMENTS
            covered += width * (rows.stop - rows.start)
    assert covered == tokens * vocab
