"""Advantages of a group's completions, from their rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import AlgoConfig

STD_EPS = 1e-6
"""Added to the standard deviation (verl, MindSpeed-RL); TRL's is 1e-4."""


class _Groups(NamedTuple):
    centred_N: Tensor
    index_N: Tensor
    counts_G: Tensor
    flat_G: Tensor
    """bool; all rewards of the group are equal, so it teaches nothing."""


def _centre(rewards_N: Tensor, group_ids_N: Tensor) -> _Groups:
    """Rewards minus their group's mean, exactly 0 in a group whose rewards are all equal."""
    import torch

    rewards_N = rewards_N.to(torch.float64)
    _, index_N = torch.unique(group_ids_N, return_inverse=True)
    groups = int(index_N.max()) + 1 if index_N.numel() else 0
    counts_G = rewards_N.new_zeros(groups).index_add_(0, index_N, torch.ones_like(rewards_N))
    mean_G = rewards_N.new_zeros(groups).index_add_(0, index_N, rewards_N) / counts_G
    zeros_G = rewards_N.new_zeros(groups)
    low_G = zeros_G.scatter_reduce(0, index_N, rewards_N, "amin", include_self=False)
    high_G = zeros_G.scatter_reduce(0, index_N, rewards_N, "amax", include_self=False)
    # Decided on the rewards themselves: the rounding of the mean would leave noise divided by eps.
    flat_G = low_G == high_G
    centred_N = (rewards_N - mean_G[index_N]).masked_fill(flat_G[index_N], 0.0)
    return _Groups(centred_N, index_N, counts_G, flat_G)


def group_norm(rewards_N: Tensor, group_ids_N: Tensor, config: AlgoConfig) -> Tensor:
    """(r - mean) / (std + 1e-6) within each group (GRPO, Shao et al. 2024, section 4.1.2).

    float64 [N] in and out; the standard deviation is the unbiased one. A group whose rewards are all
    equal, one of a single completion too, gets zeros. `group_ids_N` is any integer tensor.
    """
    groups = _centre(rewards_N, group_ids_N)
    squares_G = groups.centred_N.new_zeros(groups.counts_G.shape[0]).index_add_(
        0, groups.index_N, groups.centred_N.square()
    )
    std_G = (squares_G / (groups.counts_G - 1).clamp_min(1)).sqrt()
    return groups.centred_N / (std_G[groups.index_N] + STD_EPS)


def group_mean(rewards_N: Tensor, group_ids_N: Tensor, config: AlgoConfig) -> Tensor:
    """r - mean within each group, not divided by the deviation (Dr. GRPO, Liu et al. 2025).

    float64 [N] in and out; a group whose rewards are all equal gets exact zeros.
    """
    return _centre(rewards_N, group_ids_N).centred_N
