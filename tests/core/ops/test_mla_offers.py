"""`mla.*`: the reference and the CPU plugin's torch offers, by the same checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import cache_checks
import latent_checks as check
import pytest
import torch
import transformer_mixers
from torch import Tensor

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.mla import LatentCache
from grpo_core.ops.reference import mla as reference
from grpo_cpu import mla, mla_absorbed
from grpo_cpu.mla_cache import SharedLatentCache

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


class Offer(NamedTuple):
    cache: type[LatentCache]
    varlen: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    decode: Callable[..., Tensor]

    def make(self, spec: CacheSpec) -> LatentCache:
        return self.cache(check.latent_spec(spec))

    def model(self, dtype: torch.dtype) -> check.LatentModel:
        cache = self.make(cache_checks.spec(dtype))
        return check.LatentModel(cache=cache, decode=self.decode, prefill=self.prefill, dtype=dtype)


OFFERS = {
    "reference": Offer(
        reference.DenseLatentCache, reference.varlen, reference.prefill, reference.decode
    ),
    "torch": Offer(SharedLatentCache, mla.varlen, mla.prefill, mla_absorbed.decode),
}  # fmt: skip


@pytest.fixture(params=OFFERS)
def offer(request: pytest.FixtureRequest) -> Offer:
    return OFFERS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.TREES)
def test_varlen_with_parents(offer: Offer, case: str, dtype: torch.dtype) -> None:
    check.check_varlen(offer.varlen, dtype, *check.TREES[case])


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_without_parents(offer: Offer, dtype: torch.dtype) -> None:
    check.check_varlen(offer.varlen, dtype, [5, 0, 7], None)


def test_packed_isolation(offer: Offer) -> None:
    check.check_isolation(offer.varlen, torch.float32, (2, 8, 4, 6, 12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_prompts_and_forks(offer: Offer, dtype: torch.dtype) -> None:
    cache_checks.check_generation(offer.model(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_prefills(offer: Offer, dtype: torch.dtype) -> None:
    check.check_long_prefills(offer.model(dtype))


def test_a_slot_used_again(offer: Offer) -> None:
    cache_checks.check_a_slot_used_again(offer.model(torch.float64))


def test_room(offer: Offer) -> None:
    cache_checks.check_room(offer.make)


def test_misuse(offer: Offer) -> None:
    cache_checks.check_misuse(offer.make)
    check.check_bad_specs(offer.cache)


def test_release_and_restore(offer: Offer) -> None:
    cache_checks.check_release(offer.model(torch.float32))


def test_writes_stay_in_their_room(offer: Offer) -> None:
    check.check_writes_stay_in_their_room(offer.cache)


def test_layers_of_another_cache_are_refused(offer: Offer) -> None:
    one = torch.ones(1, 2, 4)
    at = torch.tensor([0])
    with pytest.raises(TypeError, match=f"layers of {offer.cache.__name__}"):
        offer.decode(one, one, object(), one, one, seqlens_k=at + 1, slots=at, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_equals_deepseek_v3_of_transformers(offer: Offer, dtype: torch.dtype) -> None:
    transformer_mixers.check_deepseek(offer.varlen, dtype)
