"""Cutting prompts into packed passes of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .decoder import Pass


def passes(
    prompts: Sequence[tuple[int, Sequence[int]]], *, max_tokens: int, device: torch.device
) -> Iterator[tuple[Pass, list[int]]]:
    """Passes over (slot, token ids), with the indices of the prompts that each pass ends.

    A pass takes at most `max_tokens` tokens; a prompt that does not fit goes on in the next pass against
    its cached beginning.
    """
    chunks: list[tuple[int, int, int]] = []
    room = max_tokens
    for index, (_, token_ids) in enumerate(prompts):
        start = 0
        while start < len(token_ids):
            stop = min(len(token_ids), start + room)
            chunks.append((index, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pack(prompts, chunks, device)
                chunks, room = [], max_tokens
    if chunks:
        yield pack(prompts, chunks, device)


def pack(
    prompts: Sequence[tuple[int, Sequence[int]]], chunks: Sequence[tuple[int, int, int]], device: torch.device
) -> tuple[Pass, list[int]]:
    """One pass from (prompt, start, stop) chunks."""
    lengths = np.array([stop - start for _, start, stop in chunks], dtype=np.int64)
    ends = lengths.cumsum()
    slots = np.array([prompts[index][0] for index, _, _ in chunks], dtype=np.int64)
    tokens = np.concatenate([np.asarray(prompts[i][1][a:b], dtype=np.int64) for i, a, b in chunks])
    positions = np.concatenate([np.arange(start, stop) for _, start, stop in chunks])
    finished = [row for row, (i, _, stop) in enumerate(chunks) if stop == len(prompts[i][1])]

    def tensor(values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)

    batch = Pass(
        tokens_T=tensor(tokens),
        positions_T=tensor(positions),
        slots_T=tensor(np.repeat(slots, lengths)),
        cu_seqlens=tensor(np.concatenate([[0], ends])).to(torch.int32),
        max_seqlen=int(lengths.max()),
        slots=tensor(slots),
        seqlens_k=tensor(np.array([stop for _, _, stop in chunks])),
        fresh=all(start == 0 for _, start, _ in chunks),
        last=tensor(ends[finished] - 1),
    )
    return batch, [chunks[row][0] for row in finished]
