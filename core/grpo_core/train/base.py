"""The Protocol of a trainer, and what it is built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..types import Batch, StepMetrics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..algo.loss import LossTerms
    from ..backend import Backend
    from ..config import AlgoConfig, TrainConfig
    from ..model.arch import Arch
    from ..model.weights import WeightMap
    from ..ops.collectives import Group


LossFn = Callable[["Tensor", "Tensor", Batch], "LossTerms"]
"""(logprobs_L, entropy_L, micro-batch) -> per-token loss terms; see `grpo_core.algo.loss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSetup:
    """What a trainer gets once."""

    arch: Arch
    weight_map: WeightMap
    backend: Backend
    device: torch.device
    model_path: str
    """Folder with the Hugging Face checkpoint to start from."""
    train: TrainConfig
    algo: AlgoConfig
    temperature: float
    """Of the rollout; log-probs are taken at it."""
    group: Group
    """Data-parallel group (one rank in a single process)."""
    total_steps: int
    """Optimizer steps of the whole run, for the schedule."""
    consistent: bool = False
    """Log-probs are those of the rollout engine, bit for bit; the bound ops are batch-invariant then."""


class Trainer(Protocol):
    """Holds the policy, its optimizer and (when the KL coefficient is not 0) the frozen reference."""

    def __init__(self, setup: TrainSetup) -> None: ...

    def logprobs(self, batches: Sequence[Batch], *, reference: bool) -> list[Tensor]:
        """float32 logprobs_L of each micro-batch, without gradient, by the policy or the reference."""
        ...

    def with_old(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with what the policy says of them before the first update: old_logprobs_L, and
        with train.routing_replay R2 the experts that it chose, old_experts_TMk."""
        ...

    def step(self, batches: Sequence[Batch], loss: LossFn) -> StepMetrics:
        """One optimizer step over the micro-batches of one mini-batch; the result does not depend on how
        they are split. Raises FloatingPointError on a loss or gradient that is not finite, before the
        weights change."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by Hugging Face name, in the compute dtype; tied ones once. Views: copy
        what you keep."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights (Hugging Face layout) and optimizer state into an empty folder, safetensors only."""
        ...

    def load(self, folder: Path) -> None:
        """Continue bit for bit from a folder that `save` wrote."""
        ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def describe(self) -> Mapping[str, Any]: ...

    def close(self) -> None: ...
