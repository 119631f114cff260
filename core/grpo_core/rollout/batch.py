"""What one forward pass is told about its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..ops.common import Common

    Turn = tuple[Tensor, Tensor]
    """Cosines and sines of each token's rotary angles, float32 [T, rotary_dim / 2]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One packed prefill pass: chunks of prompts, one after the other without padding."""

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    """int64, like the two above: where each token is written."""
    cu_seqlens: Tensor
    """int32 [chunks + 1]"""
    max_seqlen: int
    slots: Tensor
    """int64 [chunks], distinct"""
    seqlens_k: Tensor
    """int64 [chunks]; tokens of the sequence once this chunk is written."""
    fresh: bool
    """Every chunk starts its sequence: nothing is read from the cache."""
    last: Tensor
    """int64; the rows of T that end a prompt, whose logits are wanted."""
    common: Common | None = None


class Chunk(NamedTuple):
    """Tokens [start, stop) of one of the prompts, in one pass."""

    prompt: int
    start: int
    stop: int
    last: bool
    """The prompt ends here."""


class StepAt(NamedTuple):
    """Where the tokens of one decode step are."""

    turns: Sequence[Turn]
    """One for each distinct rotary setting of the model."""
    positions: Tensor
    """int64 [B]; where each token is written."""
    seqlens_k: Tensor
    """int64 [B]; positions + 1, one tensor for all layers: a kernel may want it on the host."""
    slots: Tensor
    """int64 [B]"""
    rows: Tensor
    """int64 [B]; rows of the recurrent states."""
    common: Common | None


class PrefillAt(NamedTuple):
    """A pass with what its layers share."""

    turns: Sequence[Turn]
    batch: Pass
    rows: Tensor
    """int64 [chunks]; rows of the recurrent states."""
