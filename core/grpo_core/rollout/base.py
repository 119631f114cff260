"""The Protocol of a rollout engine, and what it is built from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..backend import Backend
    from ..devices.base import Graph
    from ..model.arch import Arch
    from ..model.chat import Chat
    from ..model.weights import WeightMap


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSetup:
    """What an engine gets once: the model as data, the bound ops, sizes and its own options."""

    arch: Arch
    weight_map: WeightMap
    chat: Chat
    """Tokenizer, chat template and stop ids."""
    backend: Backend
    device: torch.device
    dtype: torch.dtype
    model_path: str
    max_sequences: int
    """Sequences decoded at once."""
    max_model_len: int
    """Prompt and completion tokens of one sequence."""
    options: Mapping[str, Any]
    record_experts: bool = False
    """Completions carry the experts of every token, where the model has any."""
    router_dtype: str = "float32"
    """Of the routers' logits: "float32" or "float64", as in training."""
    float64: bool = True
    """Whether the device has float64."""
    consistent: bool = False
    """A completion's tokens and log-probs depend on its prompt, seed and the weights alone, and the log-probs
    are those of the trainer, bit for bit. The bound ops are batch-invariant then."""
    capture: Callable[..., tuple[Any, Graph]] | None = None
    """`GraphDevice.capture` where every op of a decode step can be recorded in a device graph; an engine that
    has graphs of its own leaves it alone."""


class Rollout(Protocol):
    """Generates completions with log-probs; takes new weights between calls."""

    def __init__(self, setup: RolloutSetup) -> None: ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """Completions as they finish, in no fixed order. A prompt longer than max_model_len raises
        `DataError` before anything is generated."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take every weight by its Hugging Face name, in place. Raises `CheckpointError` that lists
        missing, unknown and wrongly shaped names, before anything is changed for names and shapes."""
        ...

    def sleep(self) -> None:
        """Free the weights and the cache. `load_weights` must come before `generate`; it wakes the engine."""
        ...

    def wake(self) -> None:
        """Take the memory again without new weights. An engine that cannot bring the old ones back (they
        came from a trainer and it keeps no copy) raises `GrpoError` at `generate` until `load_weights`."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Name, version, dtype, sizes and bytes held, for the plan and the run folder."""
        ...

    def close(self) -> None: ...
