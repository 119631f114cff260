"""Groups of completions that share a prompt, packed once and apart; gradients of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

VOCAB = 52


def tokens(lengths: Sequence[int], seed: int) -> list[torch.Tensor]:
    """int64 sequences without token 0, whose embedding transformers keeps at zero."""
    generator = torch.Generator().manual_seed(seed)
    return [1 + torch.randint(VOCAB, (length,), generator=generator) for length in lengths]


def packed(segments: Sequence[torch.Tensor], parents: Sequence[int]) -> dict[str, Any]:
    """Arguments of a decoder: a segment goes on where its parent ends."""
    lengths = [len(segment) for segment in segments]
    starts = [0 if parent < 0 else lengths[parent] for parent in parents]
    alone = all(parent < 0 for parent in parents)
    return {
        "tokens_T": torch.cat(list(segments)),
        "positions_T": torch.cat([s + torch.arange(n) for s, n in zip(starts, lengths, strict=True)]),
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "parents": None if alone else torch.tensor(parents, dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


def shared_groups() -> tuple[list[torch.Tensor], list[int]]:
    """Prompts shorter and longer than the convolution reaches back; one has no completion, and the last
    prompt's children come from two places."""
    segments = tokens([9, 6, 1, 2, 5, 1, 7, 4, 70, 3, 66], seed=3)
    return segments, [-1, 0, 0, -1, 3, -1, 5, -1, -1, 8, 8]


def apart(
    segments: list[torch.Tensor], parents: list[int]
) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Each completion behind its own copy of the prompt, as (sequences, whose prompt, which segment)."""
    sequences, prompts, own = [], [], []
    for segment, parent in enumerate(parents):
        if parent >= 0 or segment not in parents:
            root = segment if parent < 0 else parent
            sequences.append(
                segments[segment] if parent < 0 else torch.cat([segments[root], segments[segment]])
            )
            prompts.append(root)
            own.append(segment)
    return sequences, prompts, own


def weighted(hidden_TC: torch.Tensor, weights_TC: torch.Tensor, decoder: Any) -> dict[str, torch.Tensor]:
    """Gradients of sum(hidden * weights) by parameter."""
    decoder.zero_grad()
    (hidden_TC * weights_TC.to(hidden_TC.dtype)).sum().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in decoder.named_parameters()
    }
