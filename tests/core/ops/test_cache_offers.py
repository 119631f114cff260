"""`attention.cache` with its readers: the reference and the CPU plugin's torch offer, by the same checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cache_checks as check
import pytest
import torch
from torch import Tensor

from grpo_core.ops.attention import CacheSpec, KVCache
from grpo_core.ops.reference import attention as reference
from grpo_cpu import decode as cpu
from grpo_cpu.cache import SharedCache

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Offer(NamedTuple):
    make: Callable[[CacheSpec], KVCache]
    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]

    def model(self, dtype: torch.dtype) -> check.Model:
        cache = self.make(check.spec(dtype))
        return check.Model(cache=cache, decode=self.decode, prefill=self.prefill, dtype=dtype)


OFFERS = {
    "reference": Offer(reference.DenseCache, reference.decode, reference.prefill),
    "torch": Offer(SharedCache, cpu.decode, cpu.prefill),
}


@pytest.fixture(params=OFFERS)
def offer(request: pytest.FixtureRequest) -> Offer:
    return OFFERS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation(offer: Offer, dtype: torch.dtype) -> None:
    check.check_generation(offer.model(dtype))


def test_a_slot_used_again(offer: Offer) -> None:
    check.check_a_slot_used_again(offer.model(torch.float64))


def test_room(offer: Offer) -> None:
    check.check_room(offer.make)


def test_misuse(offer: Offer) -> None:
    check.check_misuse(offer.make)


def test_release_and_restore(offer: Offer) -> None:
    check.check_release(offer.model(torch.float32))


def test_writes_stay_in_their_room(offer: Offer) -> None:
    check.check_writes_stay_in_their_room(offer.make)


def test_layers_of_another_cache_are_refused(offer: Offer) -> None:
    at = torch.tensor([0])
    with pytest.raises(TypeError, match="layers of"):
        offer.decode(torch.ones(1, 2, 4), object(), seqlens_k=at + 1, slots=at, scale=1.0, window=None)
