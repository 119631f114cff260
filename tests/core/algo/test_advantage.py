"""Advantages against numpy's formulas, group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.algo.advantage import group_mean, group_norm
from grpo_core.config import AlgoConfig

CONFIG = AlgoConfig()


def by_hand(rewards: list[float], groups: list[int], *, norm: bool) -> np.ndarray:
    found = np.zeros(len(rewards))
    for group in set(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        values = np.array([rewards[i] for i in rows], dtype=np.float64)
        if len(set(values)) > 1:
            found[rows] = (values - values.mean()) / (values.std(ddof=1) + 1e-6 if norm else 1.0)
    return found


@given(
    st.lists(st.tuples(st.floats(-100, 100), st.integers(-3, 3)), min_size=1, max_size=40),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_equal_numpy(rows: list[tuple[float, int]], norm: bool) -> None:
    rewards, groups = [r for r, _ in rows], [g for _, g in rows]
    found = (group_norm if norm else group_mean)(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups), CONFIG
    )
    assert found.dtype == torch.float64
    # A mean of rewards up to 100 is exact to 1e-14; divided by eps where all but equal, to 1e-8.
    np.testing.assert_allclose(found.numpy(), by_hand(rewards, groups, norm=norm), rtol=1e-9, atol=2e-7)


@pytest.mark.parametrize("function", [group_norm, group_mean])
def test_rewards_all_equal_give_exact_zeros_though_their_mean_rounds(function: object) -> None:
    # 0.1 three times sums to 0.30000000000000004 and its third is not 0.1
    rewards = torch.full((3,), 0.1, dtype=torch.float64)
    assert sum(rewards.tolist()) / 3 != 0.1
    found = function(rewards, torch.zeros(3, dtype=torch.int64), CONFIG)  # type: ignore[operator]
    assert torch.equal(found, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("function", [group_norm, group_mean])
def test_group_of_one_and_no_group_at_all(function: object) -> None:
    one = function(torch.tensor([5.0]), torch.tensor([9]), CONFIG)  # type: ignore[operator]
    assert one.tolist() == [0.0]
    none = function(torch.zeros(0), torch.zeros(0, dtype=torch.int64), CONFIG)  # type: ignore[operator]
    assert none.shape == (0,)


def test_group_norm_values() -> None:
    found = group_norm(torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([1, 1, 1, 1]), CONFIG)
    # deviations of 1/2, unbiased std sqrt(4 * 1/4 / 3)
    assert found.tolist() == pytest.approx([-(0.75**0.5), 0.75**0.5] * 2, rel=1e-5)
