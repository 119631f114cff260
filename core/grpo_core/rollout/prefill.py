"""Cutting prompts into packed passes of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..ops.common import Common
from .batch import Chunk, Pass


def passes(
    prompts: Sequence[tuple[int, Sequence[int]]], *, max_tokens: int, device: torch.device
) -> Iterator[tuple[Pass, list[Chunk]]]:
    """Passes over (slot, token ids), with the chunks of each, in order.

    A pass takes at most `max_tokens` tokens; a prompt that does not fit goes on in the next pass against
    its cached beginning.
    """
    chunks: list[Chunk] = []
    room = max_tokens
    for index, (_, token_ids) in enumerate(prompts):
        start = 0
        while start < len(token_ids):
            stop = min(len(token_ids), start + room)
            chunks.append(Chunk(index, start, stop, stop == len(token_ids)))
            room -= stop - start
            start = stop
            if room == 0:
                yield pack(prompts, chunks, device), chunks
                chunks, room = [], max_tokens
    if chunks:
        yield pack(prompts, chunks, device), chunks


def pack(prompts: Sequence[tuple[int, Sequence[int]]], chunks: Sequence[Chunk], device: torch.device) -> Pass:
    """One pass from chunks."""
    lengths = np.array([chunk.stop - chunk.start for chunk in chunks], dtype=np.int64)
    ends = lengths.cumsum()
    slots = np.array([prompts[chunk.prompt][0] for chunk in chunks], dtype=np.int64)
    tokens = np.concatenate(
        [np.asarray(prompts[c.prompt][1][c.start : c.stop], dtype=np.int64) for c in chunks]
    )
    positions = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in chunks])
    finished = [row for row, chunk in enumerate(chunks) if chunk.last]

    def tensor(values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    return Pass(
        tokens_T=tensor(tokens),
        positions_T=tensor(positions),
        slots_T=tensor(np.repeat(slots, lengths)),
        cu_seqlens=tensor(np.concatenate([[0], ends])).to(torch.int32),
        max_seqlen=int(lengths.max()),
        slots=tensor(slots),
        seqlens_k=tensor(np.array([chunk.stop for chunk in chunks])),
        fresh=all(chunk.start == 0 for chunk in chunks),
        last=tensor(ends[finished] - 1),
        common=Common(
            cu_seqlens=[0, *ends.tolist()],
            seqlens_k=[chunk.stop for chunk in chunks],
            max_seqlen_k=max(chunk.stop for chunk in chunks),
        ),
    )
