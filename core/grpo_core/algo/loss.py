"""Policy losses as pure functions over tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import AlgoConfig
    from ..types import Batch


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
