"""What is particular to the torch offer of `sample.token`: pieces, and how much of a row is sorted."""

from __future__ import annotations

import pytest
import sample_checks as check
import torch

from grpo_cpu import sample

FILTERS = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (40, 0.9, 0.02), (1, 0.5, 0.5)]


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(2, torch.float32), (300, torch.bfloat16), (513, torch.float32)]
)
def test_draws_in_pieces_invert_the_distribution(
    vocab: int, dtype: torch.dtype, temperature: float, filters: tuple[int, float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sample, "PIECE", 5 * vocab)  # pieces of five rows, the last one short
    check.check_inverse_of_the_distribution(sample.sample_token, vocab, dtype, temperature, *filters)


def test_a_nucleus_wider_than_the_largest_logits_is_sorted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TOP", 4)
    check.check_inverse_of_the_distribution(sample.sample_token, 300, torch.float32, 1.5, 0, 0.95, 0.0)
    check.check_rows_of_different_kinds(sample.sample_token)
