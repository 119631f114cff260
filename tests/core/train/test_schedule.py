"""Learning rates by step, against torch's schedulers and by hand."""

from __future__ import annotations

import math

import pytest

from grpo_core.config import TrainConfig
from grpo_core.train.schedule import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    config = TrainConfig(lr=2.0, **settings)
    return [learning_rate(step, total, config) for step in range(1, total + 1)]


def test_constant() -> None:
    assert rates(3) == [2.0, 2.0, 2.0]


def test_warm_up_is_linear_and_reaches_the_rate_at_its_last_step() -> None:
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_linear_falls_evenly_and_never_spends_a_step_at_zero() -> None:
    assert rates(4, schedule="linear") == pytest.approx([2.0, 1.5, 1.0, 0.5])
    assert rates(4, schedule="linear", min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25])


def test_cosine_equals_torch() -> None:
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.2)
    wanted = []
    for _ in range(7):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(7, schedule="cosine", min_lr_ratio=0.1) == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_stays_at_the_lowest_beyond_the_end(schedule: str) -> None:
    config = TrainConfig(lr=2.0, schedule=schedule, min_lr_ratio=0.25, warmup_steps=2)
    assert learning_rate(11, 10, config) == pytest.approx(0.5)
    assert learning_rate(99, 10, config) == pytest.approx(0.5)


def test_warm_up_longer_than_the_run() -> None:
    found = rates(3, warmup_steps=10, schedule="cosine")
    assert found == pytest.approx([0.2, 0.4, 0.6])
    assert all(math.isfinite(rate) for rate in rates(1, schedule="linear", warmup_steps=1))
