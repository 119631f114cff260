"""Policy losses as pure functions over tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import AlgoConfig
    from ..types import Batch

LOG_RATIO_CLAMP = 20.0
"""Bound of a log-ratio before it is exponentiated (verl, MindSpeed-RL)."""
KL_CLAMP = 10.0
"""Bound of the k3 estimate (verl, MindSpeed-RL, ChatLearn)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Per-token loss of a micro-batch, not yet aggregated, and sums for the metrics.

    The trainer weights `loss_L` by `weight_L` and divides by the mini-batch's global denominator
    (tokens, or sequences), so that the result does not depend on how micro-batches are cut.
    """

    loss_L: Tensor
    weight_L: Tensor
    """1 for token_mean; 1 / completion length for sequence_mean."""
    sums: Mapping[str, Tensor]
    """Token sums by metric name, detached; the trainer divides by the token count."""
    maxima: Mapping[str, Tensor]


class PolicyLoss(Protocol):
    """A loss that `registry.loss` accepts."""

    def __call__(
        self, logprobs_L: Tensor, entropy_L: Tensor, batch: Batch, config: AlgoConfig
    ) -> LossTerms: ...


def aggregation_weights(batch: Batch, config: AlgoConfig) -> Tensor:
    """float32 weight_L: 1 for token_mean (DAPO), 1 / completion length for sequence_mean (GRPO)."""
    if config.aggregation == "token_mean":
        return batch.advantages_N.new_ones(batch.labels_L.shape)
    lengths_N = batch.lengths_N.clamp_min(1).to(batch.advantages_N.dtype)
    return lengths_N.reciprocal()[batch.completion_L]


def kl_to_reference(logprobs_L: Tensor, ref_logprobs_L: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference) from the policy's own tokens (Schulman 2020).

    k1 = log p - log q; k2 = (log p - log q)^2 / 2; k3 = q/p - 1 - log(q/p), never negative, with its
    log-ratio held within +-20 and its value within +-10. Differentiable in `logprobs_L`; as a loss, k1's
    gradient has mean 0 on-policy, so prefer k2 or k3. Raises ValueError for another kind.
    """
    if kind == "k1":
        return logprobs_L - ref_logprobs_L
    if kind == "k2":
        return 0.5 * (logprobs_L - ref_logprobs_L).square()
    if kind == "k3":
        log_L = (ref_logprobs_L - logprobs_L).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        return (log_L.expm1() - log_L).clamp(-KL_CLAMP, KL_CLAMP)
    raise ValueError(f"KL estimator {kind!r} is not one of k1, k2, k3")


def ppo_clip(logprobs_L: Tensor, entropy_L: Tensor, batch: Batch, config: AlgoConfig) -> LossTerms:
    """The clipped surrogate (Schulman et al. 2017, equation 7) with the completion's advantage.

    rho = exp(clamp(log p - log p_old, +-20)); loss = max(-A rho, -A clip(rho, 1 - low, 1 + high)), for
    A < 0 at most -A clip_dual where that is on (Ye et al. 2020, equation 5); plus kl_coef KL to the
    reference, minus entropy_coef entropy. Without old log-probs the step is on-policy: rho is 1 and its
    gradient that of log p. All float32 [L].
    """
    import torch

    advantages_L = batch.advantages_N[batch.completion_L]
    old_L = logprobs_L.detach() if batch.old_logprobs_L is None else batch.old_logprobs_L
    log_ratio_L = (logprobs_L - old_L).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio_L = log_ratio_L.exp()
    clipped_L = ratio_L.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    policy_L = torch.maximum(-advantages_L * ratio_L, -advantages_L * clipped_L)
    sums: dict[str, Tensor] = {}
    if config.clip_dual > 0:
        bound_L = -advantages_L * config.clip_dual
        bites_L = (advantages_L < 0) & (policy_L > bound_L)
        policy_L = torch.where(bites_L, bound_L, policy_L)
        sums["clip_dual_fraction"] = bites_L.sum()
    loss_L = policy_L
    if config.kl_coef > 0:
        if batch.ref_logprobs_L is None:
            raise ValueError("kl_coef is above 0 but the batch has no reference log-probs")
        kl_L = kl_to_reference(logprobs_L, batch.ref_logprobs_L, config.kl)
        loss_L = loss_L + config.kl_coef * kl_L
        sums["kl"] = kl_L.detach().sum()
    if config.entropy_coef != 0:
        loss_L = loss_L - config.entropy_coef * entropy_L
    ratio_L, log_ratio_L = ratio_L.detach(), log_ratio_L.detach()
    low_L = (ratio_L < 1.0 - config.clip_low) & (advantages_L < 0)
    high_L = (ratio_L > 1.0 + config.clip_high) & (advantages_L > 0)
    sums |= {
        "policy_loss": policy_L.detach().sum(),
        "entropy": entropy_L.detach().sum(),
        "approx_kl": (log_ratio_L.expm1() - log_ratio_L).sum(),
        "clip_fraction": (low_L | high_L).sum(),
        "clip_fraction_low": low_L.sum(),
        "clip_fraction_high": high_L.sum(),
    }
    maxima = {"ratio_max": ratio_L.max()} if ratio_L.numel() else {}
    return LossTerms(loss_L=loss_L, weight_L=aggregation_weights(batch, config), sums=sums, maxima=maxima)
