"""Drawing tokens: a counter-based generator per request, stop ids held back, log-probs put right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from ..types import Sampling

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
SEED_MASK = (1 << 64) - 1


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014), elementwise."""
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


def stream_keys(seeds: Iterable[int]) -> NDArray[np.uint64]:
    """Start of each request's stream; mixed, so that close seeds do not give shifted streams."""
    return mix(np.array([seed & SEED_MASK for seed in seeds], dtype=np.uint64))


def uniforms(keys_B: NDArray[np.uint64], counts_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """u in [0, 1) for token `counts_B[i]` of the stream `keys_B[i]`: 53 bits of SplitMix64.

    Depends on the pair alone, so a request draws the same tokens whatever runs beside it.
    """
    z = mix(keys_B + GAMMA * (counts_B.astype(np.uint64) + np.uint64(1)))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def in_float32(u_B: NDArray[np.float64]) -> NDArray[np.float32]:
    """The first 24 bits of u: rounding to nearest could give 1."""
    return (np.floor(u_B * 2.0**24) * 2.0**-24).astype(np.float32)


class TokenSampler:
    """`sample.token` for one `generate` call: row parameters made once, `min_tokens` kept."""

    def __init__(
        self,
        op: Callable[..., tuple[Tensor, Tensor, Tensor]],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        vocab_size: int,
        rows: int,
        device: torch.device,
        float64: bool = True,
    ) -> None:
        def fill(value: float, on: bool, dtype: torch.dtype) -> Tensor | None:
            return torch.full((rows,), value, dtype=dtype, device=device) if on else None

        outside = sorted(i for i in sampling.stop_token_ids if not 0 <= i < vocab_size)
        if outside:
            raise ConfigError(
                f"stop_token_ids {outside} are not tokens of this model",
                why=f"its vocabulary has {vocab_size} entries",
                fix="take ids from the model's tokenizer",
            )
        self.op = op
        self.device = device
        self.float64 = float64
        self.min_tokens = sampling.min_tokens
        self.temperature = torch.full((rows,), sampling.temperature, dtype=torch.float32, device=device)
        self.top_k = fill(sampling.top_k, sampling.top_k > 0, torch.int64)
        self.top_p = fill(sampling.top_p, sampling.top_p < 1, torch.float32)
        self.min_p = fill(sampling.min_p, sampling.min_p > 0, torch.float32)
        drawable = sorted(i for i in stop_ids if i < vocab_size)
        self.stop_ids = torch.tensor(drawable, dtype=torch.int64, device=device)
        self.stops = np.zeros(vocab_size, dtype=np.bool_)
        self.stops[drawable] = True
        """By token id: whether it ends a sequence."""

    def __call__(
        self, logits_BV: Tensor, keys_B: NDArray[np.uint64], counts_B: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token `counts_B` of each row: ids, log-prob as sampled, log-prob at temperature 1 unfiltered.

        May change `logits_BV`: stop ids of rows below `min_tokens` become -inf.
        """
        if counts_B.min(initial=self.min_tokens) < self.min_tokens and len(self.stop_ids):
            return self._held_back(logits_BV, keys_B, counts_B)
        return self._draw(logits_BV, keys_B, counts_B)

    def _draw(
        self, logits_BV: Tensor, keys_B: NDArray[np.uint64], counts_B: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits_BV.shape[0]
        drawn_B = uniforms(keys_B, counts_B)
        u_B = torch.from_numpy(drawn_B if self.float64 else in_float32(drawn_B)).to(self.device)
        try:
            return self.op(
                logits_BV,
                u_B,
                temperature_B=self.temperature[:rows],
                top_k_B=None if self.top_k is None else self.top_k[:rows],
                top_p_B=None if self.top_p is None else self.top_p[:rows],
                min_p_B=None if self.min_p is None else self.min_p[:rows],
            )
        except FloatingPointError as error:
            raise NonFiniteError(
                "the model's logits hold NaN or infinity",
                why="its weights have diverged, or the checkpoint holds values that overflow",
                fix="resume from an earlier checkpoint with a lower train.lr or train.max_grad_norm=1.0",
            ) from error

    def _held_back(
        self, logits_BV: Tensor, keys_B: NDArray[np.uint64], counts_B: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        below = counts_B < self.min_tokens
        below_B = None if below.all() else torch.from_numpy(below).to(self.device)
        held_BS = logits_BV.index_select(1, self.stop_ids)
        if below_B is None:
            logits_BV.index_fill_(1, self.stop_ids, float("-inf"))
        else:
            logits_BV.index_copy_(1, self.stop_ids, held_BS.masked_fill(below_B[:, None], float("-inf")))
        ids_B, logprob_B, logprob1_B = self._draw(logits_BV, keys_B, counts_B)
        # At temperature 1 "no filter" includes the mask, so its mass goes back into the normalizer:
        # log Z = log(Z_masked + sum of the held back), and log Z_masked = logit - logprob1.
        chosen_B = logits_BV.gather(1, ids_B[:, None])[:, 0].float()
        held_BS = held_BS.float()
        mass_B = held_BS[:, 0] if held_BS.shape[1] == 1 else held_BS.logsumexp(1)
        whole_B = chosen_B - torch.logaddexp(chosen_B - logprob1_B, mass_B)
        return ids_B, logprob_B, whole_B if below_B is None else torch.where(below_B, whole_B, logprob1_B)
