from __future__ import annotations

import cache_checks as check
import pytest
import torch

from grpo_core.ops.reference.attention import DenseCache, decode, prefill

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def model(dtype: torch.dtype) -> check.Model:
    return check.Model(cache=DenseCache(check.spec(dtype)), decode=decode, prefill=prefill, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_generation(dtype: torch.dtype) -> None:
    check.check_generation(model(dtype))


def test_a_slot_used_again() -> None:
    check.check_a_slot_used_again(model(torch.float64))


def test_room() -> None:
    check.check_room(DenseCache)


def test_misuse() -> None:
    check.check_misuse(DenseCache)


def test_release_and_restore() -> None:
    check.check_release(model(torch.float32))


def test_writes_stay_in_their_room() -> None:
    check.check_writes_stay_in_their_room(DenseCache)


def test_layers_of_another_cache_are_refused() -> None:
    with pytest.raises(TypeError, match="layers of"):
        decode(
            torch.ones(1, 2, 4),
            object(),
            seqlens_k=torch.tensor([1]),
            slots=torch.tensor([0]),
            scale=1.0,
            window=None,
        )
