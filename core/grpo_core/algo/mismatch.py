"""How far the rollout engine's log-probs are from the trainer's, for the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RATIO_CLAMP = 20.0


def rollout_gap(trainer_logprobs_L: Tensor, rollout_logprobs_L: Tensor) -> Tensor:
    """float32 [L] log p_trainer - log p_rollout; 0 where two exact engines run the same weights."""
    return trainer_logprobs_L.detach().float() - rollout_logprobs_L.float()


def gap_metrics(gaps: Sequence[Tensor]) -> dict[str, float]:
    """Metrics over the gaps of all micro-batches (and ranks), any device; empty without a token.

    `gap_mean`, `gap_max` and `gap_p99` are of |log p_trainer - log p_rollout| (nats); `ratio_mean` is the
    mean importance ratio p_trainer / p_rollout, 1 in expectation when both are the same distribution, its
    log held within +-20; `kl` is the k3 estimate of KL(rollout || trainer) (Schulman 2020).
    """
    import torch

    parts = [gap_L.double().cpu() for gap_L in gaps if gap_L.numel()]
    if not parts:
        return {}
    gap_L = torch.cat(parts)
    size_L = gap_L.abs()
    log_ratio_L = gap_L.clamp(-RATIO_CLAMP, RATIO_CLAMP)
    # kthvalue rather than quantile, which refuses more than 16 million elements
    rank = max(1, -(-99 * gap_L.numel() // 100))
    return {
        "mismatch/gap_mean": size_L.mean().item(),
        "mismatch/gap_max": size_L.max().item(),
        "mismatch/gap_p99": size_L.kthvalue(rank).values.item(),
        "mismatch/ratio_mean": log_ratio_L.exp().mean().item(),
        "mismatch/kl": (log_ratio_L.expm1() - log_ratio_L).mean().item(),
    }
