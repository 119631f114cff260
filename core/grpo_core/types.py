"""What flows through one GRPO step: samples, completions, scored completions, packed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt of a dataset."""

    id: str
    messages: tuple[Mapping[str, str], ...] = ()
    """Chat turns ({"role", "content"}); empty for a plain `text` prompt."""
    text: str = ""
    answer: str | None = None
    """Ground truth for a verifiable reward."""
    source: str = ""
    """Name of the dataset, for metrics by source."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Any further columns of the row, for rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens. A per-request seed makes the draw independent of the batch around it."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Stop ids are not drawn before this many tokens (benchmarks use it to fix the work)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One request to a rollout engine: G completions of one prompt."""

    id: int
    """Caller's key; completions carry it."""
    token_ids: tuple[int, ...]
    seeds: tuple[int, ...]
    """One 64-bit seed per completion wanted; its length is G."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedExperts:
    """The experts that the rollout engine chose; M layers with experts, k experts of a token."""

    prompt_PMk: Tensor
    """int16 on the host, one row for each prompt token; the same object for all samples of a group."""
    completion_NMk: Tensor
    """int16 on the host, one row for each sampled token; -1 for the last, which the engine never computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled completion."""

    prompt_id: int
    index: int
    """Which of the G completions of its prompt."""
    token_ids: tuple[int, ...]
    """Sampled ids, the stop token included when one ended it."""
    text: str
    """Decoded without special tokens, cut before a stop string."""
    logprobs: tuple[float, ...]
    """Of each token under the sampling distribution."""
    logprobs_t1: tuple[float, ...]
    """Of each token under temperature 1 and no filter."""
    finish_reason: str
    """"stop" or "length"."""
    weight_version: int
    routed_experts: RoutedExperts | None = None
    """Where the engine records them and the model has experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A completion with its prompt, rewards and advantage."""

    sample: Sample
    prompt_token_ids: tuple[int, ...]
    completion: Completion
    rewards: Mapping[str, float]
    """Unweighted value by reward name."""
    reward: float
    advantage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Packed tokens of some completions; T tokens, S segments, N completions, L loss tokens.

    A segment is a prompt or a completion. A completion attends its prompt's segment (its parent), so that
    a group's prompt is computed once. The token that predicts a completion's first token is the last of
    its prompt, so `predict_L` gathers hidden states and `labels_L` what they must predict.
    """

    tokens_T: Tensor
    """int64"""
    positions_T: Tensor
    """int64; a completion goes on where its prompt ends."""
    cu_seqlens: Tensor
    """int32 [S + 1]"""
    parents_S: Tensor
    """int32; index of the parent segment or -1."""
    max_seqlen: int
    predict_L: Tensor
    """int64 indices into T; the completions in order, each token in order."""
    labels_L: Tensor
    """int64"""
    completion_L: Tensor
    """int64; which of the N completions a loss token belongs to."""
    lengths_N: Tensor
    """int64; loss tokens of each completion."""
    advantages_N: Tensor
    """float32"""
    rollout_logprobs_L: Tensor
    """float32; log-probs by the rollout engine at the training temperature."""
    old_logprobs_L: Tensor | None = None
    """float32; by the trainer before the first update; None on-policy (the loss then detaches its own)."""
    ref_logprobs_L: Tensor | None = None
    """float32; by the frozen reference; None when the KL coefficient is 0."""
    routed_experts_TMk: Tensor | None = None
    """int16; the rollout's experts of every token, -1 where unknown; None without records."""
    old_experts_TMk: Tensor | None = None
    """int16; the experts of the pass that took the old log-probs; None unless that is replayed (R2)."""
    host_cu_seqlens: Sequence[int] | None = None
    """`cu_seqlens` on the host, so that no kernel waits for them; None where nobody knows them there."""
    host_parents: Sequence[int] | None = None
    """`parents_S` on the host."""

    def to(self, device: torch.device | str) -> Batch:
        """The same with every tensor on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if hasattr(getattr(self, f.name), "to")}
        return replace(self, **{name: tensor.to(device) for name, tensor in moved.items()})


@dataclass(slots=True)
class StepMetrics:
    """Metrics of one optimizer step, names to floats."""

    values: dict[str, float] = field(default_factory=dict)
