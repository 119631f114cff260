"""Learning rate by optimizer step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 1) of `total_steps`.

    Linear warm-up reaches `lr` at step `warmup_steps`. Then "constant" stays, "linear" and "cosine" fall
    to `lr * min_lr_ratio`, which they reach one step after the last: no step is spent at rate 0.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = max(config.warmup_steps, 1)
    done = min(1.0, (step - start) / max(total_steps - start + 1, 1))
    fall = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * fall)
