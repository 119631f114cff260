"""What is particular to the torch offer of `attention.cache`; its life: tests/core/ops/test_cache_offers."""

from __future__ import annotations

import cache_checks as check
import pytest
import torch

from grpo_cpu import decode as decode_module
from grpo_cpu.cache import SharedCache
from grpo_cpu.decode import decode, prefill


def model(dtype: torch.dtype) -> check.Model:
    return check.Model(cache=SharedCache(check.spec(dtype)), decode=decode, prefill=prefill, dtype=dtype)


def test_prefill_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "SCORES", 50)
    check.check_generation(model(torch.float64))


def test_a_batch_without_sequences() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    cache = SharedCache(check.spec(torch.float32))
    o = decode(torch.zeros(0, 6, 8), cache.layers[0], seqlens_k=empty, slots=empty, scale=1.0, window=None)
    assert o.shape == (0, 6, 4)


def test_mixed_with_shared_prefixes_a_sequence_without_one_got_its_neighbours_values() -> None:
    """Values of the first prefix were added to the output of a sequence that shares none."""
    under_test = model(torch.float64)
    cache = under_test.cache
    parent, alone = under_test.adopt(cache.allocate(6)), under_test.adopt(cache.allocate(4))
    under_test.write([parent, alone], [6, 3])
    child = under_test.adopt(cache.fork(parent, prefix=6, length=2), parent, 6)
    under_test.write([child], [1])
    under_test.check_decode([child, alone], None)


def test_plans_are_not_kept_over_changed_lengths_in_the_same_tensors() -> None:
    under_test = model(torch.float64)
    slot = under_test.adopt(under_test.cache.allocate(6))
    seqlens, slots, q = torch.tensor([0]), torch.tensor([slot]), under_test.random(1, 6, 8)
    for _ in range(4):
        under_test.write([slot], [1])
        seqlens += 1
        o = decode(q, under_test.cache.layers[1], seqlens_k=seqlens, slots=slots, scale=0.3, window=None)
        torch.testing.assert_close(o, under_test.expect(slot, q, None))
