"""Checks of `sample.token` against distributions computed in numpy, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

Impl = Callable[..., tuple[Tensor, Tensor, Tensor]]
CHI_SQUARE_999 = {7: 24.3, 2: 13.8}
"""99.9 % quantiles by degrees of freedom; seeds are fixed, so the tests do not flicker."""


def distribution(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Probabilities after the filters, by their definitions (Fan 2018, Holtzman 2020, Nguyen 2024)."""
    x = logits.astype(np.float64) / temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    if 0 < top_k < len(p):
        p = np.where(x >= np.sort(x)[-top_k], p, 0)
        p /= p.sum()
    if top_p < 1:
        mass, kept = 0.0, np.zeros(len(p), bool)
        for index in sorted(range(len(p)), key=lambda i: (-p[i], i)):
            if mass >= top_p and kept.any():
                break
            kept[index] = True
            mass += p[index]
        p = np.where(kept, p, 0)
        p /= p.sum()
    if min_p > 0:
        p = np.where(p >= min_p * p.max(), p, 0)
        p /= p.sum()
    return p


def draw(
    impl: Impl, logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B = logits.shape[0]
    return impl(
        logits, u, temperature_B=torch.full((B,), temperature),
        top_k_B=None if top_k is None else torch.full((B,), top_k),
        top_p_B=None if top_p is None else torch.full((B,), top_p),
        min_p_B=None if min_p is None else torch.full((B,), min_p),
    )  # fmt: skip


def check_inverse_of_the_distribution(
    impl: Impl, V: int, dtype: torch.dtype, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """u lies in the drawn token's step of the cumulative distribution, and log-probs are its logarithm."""
    generator = torch.Generator().manual_seed(V + top_k)
    B = 24
    logits = (3 * torch.randn(B, V, generator=generator)).to(dtype)
    kept = logits.clone()
    u = torch.rand(B, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0.0, 1 - 2.0**-53
    ids, logprob, logprob1 = draw(impl, logits, u, temperature, top_k, top_p, min_p)
    assert torch.equal(logits, kept)
    assert ids.dtype == torch.int64
    assert logprob.dtype == logprob1.dtype == torch.float32
    for row in range(B):
        x = logits[row].double().numpy()
        p, index = distribution(x, temperature, top_k, top_p, min_p), int(ids[row])
        assert p[index] > 0
        # float32 weights move a step of the distribution by some 1e-7 of the whole.
        high = p[: index + 1].sum()
        assert high - p[index] - 2e-6 <= float(u[row]) <= high + 2e-6
        assert float(logprob[row]) == pytest.approx(math.log(p[index]), abs=2e-5)
        assert float(logprob1[row]) == pytest.approx(math.log(distribution(x, 1.0)[index]), abs=2e-5)


def check_frequencies(impl: Impl) -> None:
    """Chi-square of 8000 draws from 8 tokens, plain and after top-k 3."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.1]).expand(8000, 8).contiguous()
    u = torch.rand(8000, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for temperature, top_k, freedom in ((0.8, 0, 7), (1.0, 3, 2)):
        ids, _, _ = draw(impl, logits, u, temperature, top_k)
        p = distribution(logits[0].numpy(), temperature, top_k)
        counts = np.bincount(ids.numpy(), minlength=8)
        assert (counts[p == 0] == 0).all()
        expected = 8000 * p[p > 0]
        assert ((counts[p > 0] - expected) ** 2 / expected).sum() < CHI_SQUARE_999[freedom]


def check_edges(impl: Impl) -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    one = torch.zeros(1, 1)
    assert [float(x) for x in draw(impl, one, third)] == [0, 0, 0]
    assert [float(x) for x in draw(impl, one, third, 0.0, 1, 0.1, 0.9)] == [0, 0, 0]
    # Ties: greedy takes the lowest id; top-k keeps all of the border; top-p the lowest ids.
    ties = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    ids, logprob, logprob1 = draw(impl, ties, third, temperature=0.0)
    assert (int(ids), float(logprob)) == (1, 0.0)
    assert float(logprob1) == pytest.approx(float(ties.double().log_softmax(-1)[0, 1]), abs=1e-6)
    almost = torch.tensor([1 - 1e-9], dtype=torch.float64)
    assert int(draw(impl, ties, almost, top_k=1)[0]) == 3
    ids, logprob, _ = draw(impl, ties, almost, top_p=0.5)
    assert (int(ids), float(logprob)) == (2, pytest.approx(math.log(0.5), abs=1e-6))
    assert int(draw(impl, ties, almost, top_p=0.1)[0]) == 1
    # top_k 1 without ties is greedy, with log-prob 0 at any u and temperature.
    plain = torch.tensor([[0.0, 5.0, 1.0]])
    ids, logprob, _ = draw(impl, plain, almost, temperature=1.7, top_k=1)
    assert (int(ids), float(logprob)) == (1, 0.0)
    # Filters that are off for a row, and a k beyond the vocabulary.
    for off in ({"top_k": 0}, {"top_k": 99}, {"top_p": 1.0}, {"min_p": 0.0}):
        assert int(draw(impl, plain, almost, **off)[0]) == 2


def check_infinities(impl: Impl) -> None:
    """-inf is a token that cannot be drawn; NaN, +inf and rows of nothing but -inf raise."""
    inf = torch.inf
    logits = torch.tensor([[-inf, 0.0, -inf, 1.0, -inf]])
    for u, expected in ((0.0, 1), (0.999999, 3)):
        at = torch.tensor([u], dtype=torch.float64)
        ids, logprob, _ = draw(impl, logits, at)
        assert int(ids) == expected
        assert float(logprob) == pytest.approx(float(logits.double().log_softmax(-1)[0, expected]), abs=1e-6)
        assert int(draw(impl, logits, at, temperature=0.0)[0]) == 3
        assert int(draw(impl, logits, at, top_k=2, top_p=0.99, min_p=0.01)[0]) == expected
    half = torch.full((2,), 0.5, dtype=torch.float64)
    for bad in (torch.nan, inf):
        for temperature in (1.0, 0.0):
            rows = torch.zeros(2, 5)
            rows[1, 3] = bad
            with pytest.raises(FloatingPointError):
                draw(impl, rows, half, temperature)
    with pytest.raises(FloatingPointError):
        draw(impl, torch.full((2, 5), -inf), half)


def check_rows_of_different_kinds(impl: Impl) -> None:
    """A batch of mixed rows gives what each row gives alone."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(12, 700, generator=generator)
    u = torch.rand(12, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([0.0, 1.0, 0.6, 1.4] * 3)
    top_k = torch.tensor([0, 5, 700, 1, 3, 0] * 2)
    top_p = torch.tensor([1.0, 0.7, 0.05] * 4)
    min_p = torch.tensor([0.0, 0.2] * 6)
    together = impl(logits, u, temperature_B=temperature, top_k_B=top_k, top_p_B=top_p, min_p_B=min_p)
    for row in range(12):
        one = slice(row, row + 1)
        alone = impl(
            logits[one], u[one], temperature_B=temperature[one], top_k_B=top_k[one], top_p_B=top_p[one],
            min_p_B=min_p[one],
        )  # fmt: skip
        assert int(together[0][row]) == int(alone[0])
        for a, b in zip(together[1:], alone[1:], strict=True):
            assert float(a[row]) == pytest.approx(float(b[0]), abs=1e-6)
