from __future__ import annotations

import pytest
import sample_checks as check
import torch

from grpo_core.ops.reference.fused import sample_token

FILTERS = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (40, 0.9, 0.02), (1, 0.5, 0.5)]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("vocab", [2, 300])
def test_draws_invert_the_distribution(
    vocab: int, temperature: float, filters: tuple[int, float, float]
) -> None:
    check.check_inverse_of_the_distribution(sample_token, vocab, torch.float32, temperature, *filters)


def test_frequencies() -> None:
    check.check_frequencies(sample_token)


def test_edges() -> None:
    check.check_edges(sample_token)


def test_infinities_and_nan() -> None:
    check.check_infinities(sample_token)


def test_rows_of_different_kinds() -> None:
    check.check_rows_of_different_kinds(sample_token)
