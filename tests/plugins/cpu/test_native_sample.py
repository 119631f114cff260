"""sample.token of the C++ pack against the float64 reference, and its distribution against the softmax."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_core.ops.reference import fused as reference
from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
sample_token = importlib.import_module("grpo_cpu.native_ops").sample_token


def draw_case(rows: int, vocab: int, seed: int, dtype: torch.dtype):
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=random) * 3).to(dtype)
    u = torch.rand(rows, generator=random, dtype=torch.float64)
    temperature = torch.rand(rows, generator=random) * 1.5
    temperature[::5] = 0.0
    return logits, u, temperature


def filters(rows: int, which: str, seed: int):
    random = torch.Generator().manual_seed(seed)
    k = torch.randint(0, 60, (rows,), generator=random) if "k" in which else None
    p = torch.rand(rows, generator=random) if "p" in which else None
    m = torch.rand(rows, generator=random) * 0.3 if "m" in which else None
    if p is not None:
        p[::4] = 1.0
    return {"top_k_B": k, "top_p_B": p, "min_p_B": m}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 3, 16, 511, 512, 513, 5000])
@pytest.mark.parametrize("which", ["", "k", "p", "m", "kpm"])
def test_draws_equal_the_float64_reference(dtype, vocab, which):
    logits, u, temperature = draw_case(64, vocab, vocab, dtype)
    options = {"temperature_B": temperature, **filters(64, which, 1)}
    before = logits.clone()
    ids, logprob, logprob1 = sample_token(logits, u, **options)
    want_ids, want, want1 = reference.sample_token(logits, u, **options)
    assert torch.equal(logits, before)
    # Float32 sums move the borders of the cumulative distribution by about 1e-7: of 64 draws over 5000
    # tokens one may fall on the other side of a border.
    assert (ids != want_ids).sum() <= 1
    same = ids == want_ids
    torch.testing.assert_close(logprob[same], want[same], rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(logprob1[same], want1[same], rtol=2e-6, atol=5e-6)


def test_frequencies_follow_the_softmax():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50, generator=random).bfloat16()
    rows = 40000
    ids, _, _ = sample_token(
        logits.expand(rows, 50),
        torch.rand(rows, generator=random, dtype=torch.float64),
        temperature_B=torch.full((rows,), 0.7),
        top_k_B=None,
        top_p_B=None,
        min_p_B=None,
    )
    want = (logits.double() / 0.7).softmax(-1)[0]
    count = torch.bincount(ids, minlength=50)
    # Chi-square with 49 degrees of freedom: above 94.6 in one of ten thousand.
    assert ((count - rows * want) ** 2 / (rows * want)).sum() < 94.6


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_ends_of_the_unit_interval_draw_tokens_with_a_probability(u):
    logits = torch.full((1, 2000), -float("inf"))
    logits[0, 700], logits[0, 1300] = 1.0, 2.0
    ids, logprob, _ = sample_token(
        logits,
        torch.tensor([u], dtype=torch.float64),
        temperature_B=torch.ones(1),
        top_k_B=None,
        top_p_B=None,
        min_p_B=None,
    )
    assert ids.item() == (700 if u == 0 else 1300)
    want = torch.tensor([1.0, 2.0]).log_softmax(0)[0 if u == 0 else 1]
    torch.testing.assert_close(logprob[0], want)


def test_equal_logits_keep_the_lowest_ids_under_top_p_and_all_under_top_k():
    logits = torch.zeros(1, 40)
    options = {
        "temperature_B": torch.ones(1),
        "top_k_B": None,
        "top_p_B": torch.tensor([0.5]),
        "min_p_B": None,
    }
    last = torch.tensor([1 - 1e-12], dtype=torch.float64)
    assert sample_token(logits, last, **options)[0].item() == 19
    options |= {"top_k_B": torch.tensor([3]), "top_p_B": None}
    assert sample_token(logits, last, **options)[0].item() == 39
    options |= {"temperature_B": torch.zeros(1)}
    ids, logprob, _ = sample_token(logits, last, **options)
    assert ids.item() == 0 and logprob.item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 17, 99])
def test_a_row_that_is_not_a_distribution_raises(bad, column):
    logits = torch.zeros(3, 100).bfloat16()
    logits[1, column] = bad
    options = {"temperature_B": torch.ones(3), "top_k_B": None, "top_p_B": None, "min_p_B": None}
    with pytest.raises(FloatingPointError):
        sample_token(logits, torch.zeros(3, dtype=torch.float64), **options)


def test_a_row_of_minus_infinity_raises():
    logits = torch.full((1, 30), -float("inf"))
    options = {"temperature_B": torch.ones(1), "top_k_B": None, "top_p_B": None, "min_p_B": None}
    with pytest.raises(FloatingPointError):
        sample_token(logits, torch.zeros(1, dtype=torch.float64), **options)
