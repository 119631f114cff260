"""Metrics of the gap between rollout and trainer against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from grpo_core.algo.mismatch import gap_metrics, rollout_gap


def test_equal_numpy_over_all_parts() -> None:
    rng = np.random.default_rng(0)
    trainer, rollout = rng.normal(-2, 1, 1003).astype(np.float32), rng.normal(-2, 1, 1003).astype(np.float32)
    parts = [slice(0, 400), slice(400, 400), slice(400, 1003)]
    gaps = [rollout_gap(torch.tensor(trainer[part]), torch.tensor(rollout[part])) for part in parts]
    d = (trainer - rollout).astype(np.float64)
    found = gap_metrics(gaps)
    assert found["mismatch/gap_mean"] == pytest.approx(np.abs(d).mean())
    assert found["mismatch/gap_max"] == pytest.approx(np.abs(d).max())
    assert found["mismatch/gap_p99"] == pytest.approx(np.quantile(np.abs(d), 0.99, method="inverted_cdf"))
    assert found["mismatch/ratio_mean"] == pytest.approx(np.exp(d).mean())
    assert found["mismatch/kl"] == pytest.approx((np.exp(d) - 1 - d).mean())


def test_no_gap_is_zero_and_no_token_is_no_metric() -> None:
    same = torch.randn(5)
    found = gap_metrics([rollout_gap(same, same)])
    assert found.pop("mismatch/ratio_mean") == 1.0
    assert set(found.values()) == {0.0}
    assert gap_metrics([]) == gap_metrics([torch.zeros(0)]) == {}


def test_a_token_that_the_trainer_thinks_impossible_stays_finite() -> None:
    found = gap_metrics([torch.tensor([-500.0, 500.0])])
    assert found["mismatch/gap_max"] == 500.0
    assert all(np.isfinite(value) for value in found.values())
