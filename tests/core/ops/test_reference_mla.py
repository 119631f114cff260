from __future__ import annotations

import cache_checks
import latent_checks as check
import pytest
import torch
import transformer_mixers

from grpo_core.ops.attention import CacheSpec
from grpo_core.ops.reference.mla import DenseLatentCache, decode, prefill, varlen

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make(spec: CacheSpec) -> DenseLatentCache:
    return DenseLatentCache(check.latent_spec(spec))


def model(dtype: torch.dtype) -> check.LatentModel:
    cache = make(cache_checks.spec(dtype))
    return check.LatentModel(cache=cache, decode=decode, prefill=prefill, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.TREES)
def test_varlen_with_parents(case: str, dtype: torch.dtype) -> None:
    check.check_varlen(varlen, dtype, *check.TREES[case])


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen_without_parents(dtype: torch.dtype) -> None:
    check.check_varlen(varlen, dtype, [5, 0, 7], None)


def test_packed_isolation() -> None:
    check.check_isolation(varlen, torch.float32, (2, 8, 4, 6, 12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation(dtype: torch.dtype) -> None:
    cache_checks.check_generation(model(dtype))


def test_long_prefills() -> None:
    check.check_long_prefills(model(torch.float64))


def test_a_slot_used_again() -> None:
    cache_checks.check_a_slot_used_again(model(torch.float64))


def test_room() -> None:
    cache_checks.check_room(make)


def test_misuse() -> None:
    cache_checks.check_misuse(make)
    check.check_bad_specs(DenseLatentCache)


def test_release_and_restore() -> None:
    cache_checks.check_release(model(torch.float32))


def test_writes_stay_in_their_room() -> None:
    check.check_writes_stay_in_their_room(DenseLatentCache)


def test_layers_of_another_cache_are_refused() -> None:
    one = torch.ones(1, 2, 4)
    at = torch.tensor([0])
    with pytest.raises(TypeError, match="layers of DenseLatentCache"):
        decode(one, one, object(), one, one, seqlens_k=at + 1, slots=at, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_equals_deepseek_v3_of_transformers(dtype: torch.dtype) -> None:
    transformer_mixers.check_deepseek(varlen, dtype)
