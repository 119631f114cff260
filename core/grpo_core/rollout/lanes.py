"""The running sequences as arrays: one row each, changed all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

FIELDS = ("lanes", "groups", "samples", "slots", "keys", "counts", "limits")


Drawn = tuple[int, int, int, list[int], list[float], list[float]]
"""One running sequence with the tokens that it has: its lane, group and sample, then the tokens' ids, their
log-probs and those at temperature 1. Not a named tuple: hundreds are made at once, and read once."""


class Lanes:
    """B running sequences of at most `capacity`.

    Row arrays are dense and in the order of starting; a row's lane is its line in the output arrays, kept
    from start to finish.
    """

    def __init__(self, capacity: int, max_tokens: int, device: torch.device) -> None:
        self.device = device
        self.out_ids = np.zeros((capacity, max_tokens), dtype=np.int64)
        self.out_logprobs = np.zeros((capacity, max_tokens), dtype=np.float32)
        self.out_logprobs1 = np.zeros((capacity, max_tokens), dtype=np.float32)
        self._free = list(range(capacity - 1, -1, -1))
        none = np.zeros(0, dtype=np.int64)
        self.lanes = none
        self.groups = none
        """Index of the prompt."""
        self.samples = none
        """Which of its prompt's completions."""
        self.slots = none
        self.keys: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self.counts = none
        """Tokens drawn so far."""
        self.limits = none
        """Tokens to draw at most."""
        self.tokens_B = torch.zeros(0, dtype=torch.int64, device=device)
        """The token drawn last, which the next step reads, ..."""
        self.positions_B = self.tokens_B
        """... and where it is written."""
        self.slots_B = self.tokens_B

    def __len__(self) -> int:
        return len(self.lanes)

    def add(
        self,
        *,
        groups: NDArray[np.int64],
        samples: NDArray[np.int64],
        slots: NDArray[np.int64],
        keys: NDArray[np.uint64],
        limits: NDArray[np.int64],
        positions: NDArray[np.int64],
    ) -> slice:
        """Rows for new sequences whose first token will be at `positions`; where they are."""
        count = len(groups)
        new = {
            "lanes": np.array([self._free.pop() for _ in range(count)], dtype=np.int64),
            "groups": groups, "samples": samples, "slots": slots, "keys": keys, "limits": limits,
            "counts": np.zeros(count, dtype=np.int64),
        }  # fmt: skip
        for name in FIELDS:
            setattr(self, name, np.concatenate([getattr(self, name), new[name]]))
        positions_new = torch.from_numpy(positions).to(self.device)
        self.positions_B = torch.cat([self.positions_B, positions_new])
        self.slots_B = torch.cat([self.slots_B, torch.from_numpy(slots).to(self.device)])
        self.tokens_B = torch.cat([self.tokens_B, torch.zeros_like(positions_new)])
        return slice(len(self) - count, len(self))

    def record(self, rows: slice, ids_B: Tensor, logprob_B: Tensor, logprob1_B: Tensor) -> NDArray[np.int64]:
        """Note the tokens drawn for `rows`; their ids on the host."""
        lanes, counts = self.lanes[rows], self.counts[rows]
        ids: NDArray[np.int64] = ids_B.cpu().numpy()
        self.out_ids[lanes, counts] = ids
        self.out_logprobs[lanes, counts] = logprob_B.cpu().numpy()
        self.out_logprobs1[lanes, counts] = logprob1_B.cpu().numpy()
        counts += 1
        if len(ids) == len(self):
            self.tokens_B = ids_B
        else:
            self.tokens_B[rows] = ids_B
        return ids

    def drawn(self, rows: NDArray[np.int64]) -> Iterator[Drawn]:
        """What was drawn for these rows so far, as Python values, converted all at once."""
        lanes, counts = self.lanes[rows], self.counts[rows]
        keys = (lanes, self.groups[rows], self.samples[rows], counts)
        longest = counts.max(initial=0)
        columns = (
            out[lanes, :longest].tolist() for out in (self.out_ids, self.out_logprobs, self.out_logprobs1)
        )
        parts = zip(*(key.tolist() for key in keys), *columns, strict=True)
        for lane, group, sample, count, ids, logprobs, logprobs1 in parts:
            yield lane, group, sample, ids[:count], logprobs[:count], logprobs1[:count]

    def keep(self, rows: NDArray[np.bool_]) -> None:
        """Let the other rows go."""
        self._free.extend(self.lanes[~rows].tolist())
        for name in FIELDS:
            setattr(self, name, getattr(self, name)[rows])
        at = torch.from_numpy(np.flatnonzero(rows)).to(self.device)
        self.tokens_B = self.tokens_B[at]
        self.positions_B = self.positions_B[at]
        self.slots_B = self.slots_B[at]
