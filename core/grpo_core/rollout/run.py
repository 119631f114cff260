"""One `generate` call: prefill, start, step, until every sample has finished."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..types import Completion
from .lanes import Lanes
from .prefill import passes
from .sampler import TokenSampler, stream_keys
from .scheduler import Scheduler
from .stop import StopText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ..ops.attention import KVCache
    from ..types import Prompt, Sampling
    from .base import RolloutSetup
    from .decoder import InferenceDecoder


@dataclass(slots=True)
class Counters:
    """Work done by an engine since it was made."""

    prefill_tokens: int = 0
    """Prompt tokens computed; a group's prompt counts once."""
    prefill_passes: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    """Sequences, summed over the decode steps."""
    sampled_tokens: int = 0
    prefill_seconds: float = 0.0
    """Until the first tokens of the started samples are drawn."""
    decode_seconds: float = 0.0


class Run:
    """The state of one call; `advance` until `done`."""

    def __init__(
        self, setup: RolloutSetup, decoder: InferenceDecoder, cache: KVCache, prompts: Sequence[Prompt],
        sampling: Sampling, *, counters: Counters, weight_version: int, cache_tokens: int,
        prefill_tokens: int,
    ) -> None:  # fmt: skip
        self.setup = setup
        self.decoder = decoder
        self.prompts = prompts
        self.sampling = sampling
        self.counters = counters
        self.weight_version = weight_version
        self.prefill_tokens = prefill_tokens
        lengths = np.array([len(prompt.token_ids) for prompt in prompts], dtype=np.int64)
        sizes = np.array([len(prompt.seeds) for prompt in prompts], dtype=np.int64)
        self.prompt_lengths = lengths
        self.limits = np.minimum(setup.max_model_len - lengths, sampling.max_tokens)
        self.keys = stream_keys(seed for prompt in prompts for seed in prompt.seeds)
        self.first_key = np.concatenate([[0], sizes.cumsum()[:-1]])
        self.scheduler = Scheduler(
            cache, prompt_tokens=lengths, group_sizes=sizes, new_tokens=self.limits,
            max_sequences=setup.max_sequences, max_tokens=cache_tokens,
        )  # fmt: skip
        rows = min(setup.max_sequences, int(sizes.sum()))
        self.lanes = Lanes(rows, int(self.limits.max()), setup.device)
        stop_ids = frozenset((*setup.chat.stop_token_ids, *sampling.stop_token_ids))
        self.sampler = TokenSampler(
            setup.backend.sample.token, sampling, stop_ids=stop_ids, vocab_size=setup.arch.vocab_size,
            rows=rows, device=setup.device,
        )  # fmt: skip
        self.first_logits: dict[int, Tensor] = {}
        """Logits [V] after the prompt of each group that has samples to start."""
        self.texts: dict[int, StopText] = {}
        """By lane; only with stop strings."""

    @property
    def done(self) -> bool:
        return self.scheduler.done

    @torch.inference_mode()
    def advance(self) -> list[Completion]:
        """Admit what fits and decode one token for every running sequence; what finished by that."""
        began = time.perf_counter()
        finished = self._admit()
        between = time.perf_counter()
        if len(self.lanes):
            finished += self._step()
        self.counters.prefill_seconds += between - began
        self.counters.decode_seconds += time.perf_counter() - between
        return finished

    def _admit(self) -> list[Completion]:
        planned = self.scheduler.to_prefill()
        prompts = [(slot, self.prompts[group].token_ids) for group, slot in planned]
        for batch, ended in passes(prompts, max_tokens=self.prefill_tokens, device=self.setup.device):
            logits_PV = self.decoder.prefill(batch)
            self.counters.prefill_passes += 1
            self.counters.prefill_tokens += len(batch.tokens_T)
            for row, index in enumerate(ended):
                self.first_logits[planned[index][0]] = logits_PV[row]
        starts = self.scheduler.start()
        if not starts:
            return []
        groups = np.array([start.group for start in starts], dtype=np.int64)
        samples = np.array([start.sample for start in starts], dtype=np.int64)
        logits_BV = torch.stack([self.first_logits[start.group] for start in starts])
        rows = self.lanes.add(
            groups=groups,
            samples=samples,
            slots=np.array([start.slot for start in starts], dtype=np.int64),
            keys=self.keys[self.first_key[groups] + samples],
            limits=self.limits[groups],
            positions=self.prompt_lengths[groups],
        )
        for group in [group for group in self.first_logits if group < self.scheduler.head]:
            del self.first_logits[group]
        if self.sampling.stop:
            for lane in self.lanes.lanes[rows].tolist():
                self.texts[lane] = StopText(self.setup.chat.decode, self.sampling.stop)
        return self._draw(rows, logits_BV)

    def _step(self) -> list[Completion]:
        lanes = self.lanes
        logits_BV = self.decoder.step(lanes.tokens_B, lanes.positions_B, lanes.slots_B)
        lanes.positions_B += 1
        self.counters.decode_steps += 1
        self.counters.decode_rows += len(lanes)
        return self._draw(slice(0, len(lanes)), logits_BV)

    def _draw(self, rows: slice, logits_BV: Tensor) -> list[Completion]:
        """Sample one token for `rows` and let go of the sequences that it ends."""
        lanes = self.lanes
        drawn = self.sampler(logits_BV, lanes.keys[rows], lanes.counts[rows])
        ids = lanes.record(rows, *drawn)
        self.counters.sampled_tokens += len(ids)
        stopped = self.sampler.stops[ids]
        by_text = self._stopped_by_text(rows, ids, stopped) if self.sampling.stop else None
        ended = stopped | (lanes.counts[rows] >= lanes.limits[rows])
        if by_text is not None:
            ended |= by_text
        if not ended.any():
            return []
        return self._finish(rows, ended, stopped, by_text)

    def _stopped_by_text(
        self, rows: slice, ids: NDArray[np.int64], stopped: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        hits = np.zeros(len(ids), dtype=np.bool_)
        late = self.lanes.counts[rows] >= self.sampling.min_tokens
        for row, lane in enumerate(self.lanes.lanes[rows].tolist()):
            if not stopped[row]:
                hits[row] = self.texts[lane].push(int(ids[row]), check=bool(late[row]))
        return hits

    def _finish(
        self, rows: slice, ended: NDArray[np.bool_], stopped: NDArray[np.bool_],
        by_text: NDArray[np.bool_] | None,
    ) -> list[Completion]:  # fmt: skip
        lanes = self.lanes
        completions = []
        for row in np.flatnonzero(ended).tolist():
            cut = by_text is not None and bool(by_text[row])
            completions.append(self._completion(rows.start + row, by_id=bool(stopped[row]), by_text=cut))
        gone = np.zeros(len(lanes), dtype=np.bool_)
        gone[rows] = ended
        self.scheduler.finish(lanes.groups[gone].tolist(), lanes.slots[gone].tolist())
        lanes.keep(~gone)
        return completions

    def _completion(self, row: int, *, by_id: bool, by_text: bool) -> Completion:
        lanes = self.lanes
        lane, count = int(lanes.lanes[row]), int(lanes.counts[row])
        ids: list[int] = lanes.out_ids[lane, :count].tolist()
        text = self.texts.pop(lane, None)
        return Completion(
            prompt_id=self.prompts[int(lanes.groups[row])].id,
            index=int(lanes.samples[row]),
            token_ids=tuple(ids),
            text=text.text if text and by_text else self.setup.chat.decode(ids[:-1] if by_id else ids),
            logprobs=tuple(lanes.out_logprobs[lane, :count].tolist()),
            logprobs_t1=tuple(lanes.out_logprobs1[lane, :count].tolist()),
            finish_reason="stop" if by_id or by_text else "length",
            weight_version=self.weight_version,
        )
