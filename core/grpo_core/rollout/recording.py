"""Noting which experts computed each token, for the trainer to replay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..model.arch import MoE
from ..types import RoutedExperts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..model.arch import Arch
    from .batch import Chunk
    from .lanes import Lanes

UNKNOWN = -1


def routed_shape(arch: Arch) -> tuple[int, int]:
    """(M, k): layers with experts and experts of a token; (0, 0) for a dense model."""
    chosen = [layer.ffn.top_k for layer in arch.layers if isinstance(layer.ffn, MoE)]
    return len(chosen), max(chosen, default=0)


class ExpertRecorder:
    """The records of one `generate` call; host memory, int16.

    A decode step computes the token that was drawn before it, so a completion's last token has no row.
    """

    def __init__(
        self, shape: tuple[int, int], *, prompt_lengths: Sequence[int], lanes: int, max_tokens: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.device = device
        self._lengths = prompt_lengths
        self._prompts: dict[int, Tensor] = {}
        """By group, from its first chunk until its last completion."""
        # Untouched rows take no memory: the system gives pages when they are written.
        self._rows = np.empty((lanes, max_tokens, *shape), dtype=np.int16)

    def buffer(self, tokens: int) -> Tensor:
        """Where a forward pass writes: int16 [tokens, M, k] on the device."""
        return torch.full((tokens, *self.shape), UNKNOWN, dtype=torch.int16, device=self.device)

    def note_pass(self, record_TMk: Tensor, chunks: Sequence[Chunk], groups: Sequence[int]) -> None:
        """Keep a prefill pass; groups[chunk.prompt] is the group whose prompt it is."""
        host_TMk, start = record_TMk.cpu(), 0
        for chunk in chunks:
            group = groups[chunk.prompt]
            if chunk.start == 0:
                self._prompts[group] = torch.empty(self._lengths[group], *self.shape, dtype=torch.int16)
            end = start + chunk.stop - chunk.start
            self._prompts[group][chunk.start : chunk.stop] = host_TMk[start:end]
            start = end

    def note_step(self, record_BMk: Tensor, lanes: Lanes) -> None:
        """Keep a decode step over all running rows, before the next tokens are drawn."""
        self._rows[lanes.lanes, lanes.counts - 1] = record_BMk.cpu().numpy()

    def take(self, group: int, lane: int, count: int) -> RoutedExperts:
        """The record of a finished completion of `count` tokens."""
        completion_NMk = torch.full((count, *self.shape), UNKNOWN, dtype=torch.int16)
        completion_NMk[: count - 1] = torch.from_numpy(self._rows[lane, : count - 1])
        return RoutedExperts(prompt_PMk=self._prompts[group], completion_NMk=completion_NMk)

    def forget(self, group: int) -> None:
        """A group's last completion has finished."""
        self._prompts.pop(group, None)
