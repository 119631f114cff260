"""Packed attention: the reference and the CPU plugin's torch offers, by the same checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import op_checks as check
import pytest
import torch
from torch import Tensor

from grpo_core.ops.reference import attention as reference
from grpo_cpu import attention, tiles

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Offer(NamedTuple):
    varlen: Callable[..., Tensor]
    shared_prefix: Callable[..., Tensor]
    tile: int = 0
    """Scores of a tile: small ones cut the same cases into blocks of queries."""


TORCH = (attention.varlen, attention.shared_prefix)
OFFERS = {
    "reference": Offer(reference.varlen, reference.shared_prefix),
    "torch, large tiles": Offer(*TORCH, 1 << 20),
    "torch, small tiles": Offer(*TORCH, 600),
    "torch, smallest tiles": Offer(*TORCH, 1),
}


@pytest.fixture(params=OFFERS)
def offer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Offer:
    chosen = OFFERS[request.param]
    if chosen.tile:
        monkeypatch.setattr(tiles, "SCORES", chosen.tile)
        tiles.plan_tiles.cache_clear()
    return chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", check.LENGTHS)
def test_shared_prefix(offer: Offer, case: str, window: int | None, dtype: torch.dtype) -> None:
    check.check_shared_prefix(offer.shared_prefix, case, dtype, window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("case", check.LENGTHS)
def test_varlen(offer: Offer, case: str, window: int | None, causal: bool) -> None:
    check.check_varlen(offer.varlen, case, torch.float64, window, causal)
    check.check_varlen(offer.varlen, case, torch.bfloat16, window, causal)


def test_packed_sequences_never_see_each_other(offer: Offer) -> None:
    check.check_packed_isolation(offer.varlen, offer.shared_prefix)


def test_bad_packing_is_refused(offer: Offer) -> None:
    check.check_bad_packing(offer.varlen, offer.shared_prefix)


def test_heads_that_do_not_divide_are_refused(offer: Offer) -> None:
    q, k, v = check.qkv(4, 3, 2, 4, 4, torch.float32)
    with pytest.raises(ValueError, match="3 query heads"):
        offer.varlen(
            q, k, v, cu_seqlens=check.cumulative([4]), max_seqlen=4, scale=1.0, causal=True, window=None
        )
