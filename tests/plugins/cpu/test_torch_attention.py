from __future__ import annotations

import op_checks as check
import pytest
import torch

from grpo_cpu import tiles
from grpo_cpu.attention import shared_prefix, varlen

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=[1 << 20, 600, 1], ids=["large tiles", "small tiles", "smallest tiles"])
def tile_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles cut the same cases into blocks of queries."""
    monkeypatch.setattr(tiles, "SCORES", request.param)
    tiles.plan_tiles.cache_clear()


@pytest.mark.usefixtures("tile_size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", check.LENGTHS)
def test_shared_prefix(case: str, window: int | None, dtype: torch.dtype) -> None:
    check.check_shared_prefix(shared_prefix, case, dtype, window)


@pytest.mark.usefixtures("tile_size")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", check.LENGTHS)
def test_varlen(case: str, window: int | None, causal: bool) -> None:
    check.check_varlen(varlen, case, torch.float64, window, causal)
    check.check_varlen(varlen, case, torch.bfloat16, window, causal)


@pytest.mark.usefixtures("tile_size")
def test_packed_sequences_never_see_each_other() -> None:
    check.check_packed_isolation(varlen, shared_prefix)


def test_bad_packing_is_refused() -> None:
    check.check_bad_packing(varlen, shared_prefix)


def test_no_tokens_at_all() -> None:
    q, k, v = check.qkv(0, 2, 1, 4, 4, torch.float32)
    q.requires_grad_()
    o = varlen(q, k, v, cu_seqlens=check.cumulative([0]), max_seqlen=0, scale=1.0, causal=True, window=None)
    o.sum().backward()
    assert o.shape == q.grad.shape == (0, 2, 4)


def test_tiles_hold_few_pads() -> None:
    """64 completions of all lengths from 1 to 64: padding to the longest would double the queries."""
    ends = [0]
    for length in (47, *range(1, 65)):
        ends.append(ends[-1] + length)
    plan = tiles.plan_tiles(tuple(ends), (-1, *[0] * 64), 9, 3, True, None, torch.bfloat16)
    assert sum(tile.n * tile.Q for tile in plan.tiles) < 1.25 * ends[-1]
    assert len(plan.tiles) < 20
