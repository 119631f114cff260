"""The order of prompts: an endless stream of epochs, addressed by one integer."""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15


class PromptOrder:
    """Which of `n` samples stands at each position of the stream; every epoch holds each sample once.

    A pure function of (n, seed, shuffle, position): batch size, number of ranks and where a run was
    interrupted do not matter, and a resumed run goes on from the position that it has reached.
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True) -> None:
        if n < 1:
            raise ValueError(f"an order needs one sample at least, not {n}")
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: np.ndarray[tuple[int], np.dtype[np.int64]] = np.arange(n)

    def at(self, position: int) -> int:
        """Index in [0, n) of the sample at `position` >= 0."""
        epoch, place = divmod(position, self.n)
        if not self.shuffle:
            return place
        if epoch != self._epoch:
            self._order = permutation(self.n, self.seed, epoch)
            self._epoch = epoch
        return int(self._order[place])

    def state(self) -> dict[str, int]:
        """What has to be the same for a position to mean the same sample."""
        return {"n": self.n, "seed": self.seed, "shuffle": int(self.shuffle)}


def permutation(n: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The permutation of an epoch, int64 [n]: indices sorted by their SplitMix64 hash (Steele et al. 2014).

    Spelled out here because numpy does not promise that its generators give the same permutation in
    every version, and a resumed run may meet another version.
    """
    key = _mix(np.array([seed % 2**64], dtype=np.uint64))
    key = _mix(key ^ np.uint64(epoch % 2**64))
    return np.argsort(_mix(key + np.arange(n).astype(np.uint64)), kind="stable")


def _mix(x: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Bijective 64-bit mixer; arithmetic is modulo 2**64."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
