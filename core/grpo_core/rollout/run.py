"""One `generate` call: prefill, start, step, until every sample has finished."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..ops.common import Common
from ..types import Completion
from .lanes import Lanes
from .prefill import passes
from .recording import ExpertRecorder, routed_shape
from .sampler import TokenSampler, stream_keys
from .scheduler import Scheduler
from .stop import StopText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from ..types import Prompt, Sampling
    from .base import RolloutSetup
    from .decoder import InferenceDecoder
    from .graphs import GraphedDecoder
    from .lanes import Drawn
    from .scheduler import Slots


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
        self, setup: RolloutSetup, decoder: InferenceDecoder | GraphedDecoder, cache: Slots,
        prompts: Sequence[Prompt], sampling: Sampling, *, counters: Counters, weight_version: int,
        cache_tokens: int, prefill_tokens: int,
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
            rows=rows, device=setup.device, float64=setup.float64,
        )  # fmt: skip
        shape = routed_shape(setup.arch) if setup.record_experts else (0, 0)
        self.recorder = (
            ExpertRecorder(
                shape, prompt_lengths=lengths.tolist(), lanes=rows, max_tokens=int(self.limits.max()),
                device=setup.device,
            )
            if shape[0]
            else None
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
        self._prefill(planned)
        starts = self.scheduler.start()
        if not starts:
            return []
        groups = np.array([start.group for start in starts], dtype=np.int64)
        samples = np.array([start.sample for start in starts], dtype=np.int64)
        started, group_of = np.unique(groups, return_inverse=True)
        logits_GV = torch.stack([self.first_logits[group] for group in started.tolist()])
        logits_BV = logits_GV.index_select(0, torch.from_numpy(group_of).to(self.setup.device))
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

    def _prefill(self, planned: list[tuple[int, int]]) -> None:
        """Compute the prompts of (group, slot) pairs, and keep their last logits."""
        groups = [group for group, _ in planned]
        prompts = [(slot, self.prompts[group].token_ids) for group, slot in planned]
        for batch, chunks in passes(prompts, max_tokens=self.prefill_tokens, device=self.setup.device):
            record = self.recorder.buffer(len(batch.tokens_T)) if self.recorder else None
            logits_PV = self.decoder.prefill(batch, record)
            if self.recorder and record is not None:
                self.recorder.note_pass(record, chunks, groups)
            self.counters.prefill_passes += 1
            self.counters.prefill_tokens += len(batch.tokens_T)
            ended = [groups[chunk.prompt] for chunk in chunks if chunk.last]
            self.first_logits.update(zip(ended, logits_PV, strict=True))

    def _step(self) -> list[Completion]:
        lanes = self.lanes
        record = self.recorder.buffer(len(lanes)) if self.recorder else None
        common = Common(seqlens_k=self._seqlens_k, max_seqlen_k=self.setup.max_model_len)
        logits_BV = self.decoder.step(lanes.tokens_B, lanes.positions_B, lanes.slots_B, record, common)
        if self.recorder and record is not None:
            self.recorder.note_step(record, lanes)
        lanes.positions_B += 1
        self.counters.decode_steps += 1
        self.counters.decode_rows += len(lanes)
        return self._draw(slice(0, len(lanes)), logits_BV)

    def _seqlens_k(self) -> NDArray[np.int64]:
        """Tokens of each running sequence with the one that this step writes; asked for by few devices."""
        seqlens: NDArray[np.int64] = self.prompt_lengths[self.lanes.groups] + self.lanes.counts
        return seqlens

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
        at = np.flatnonzero(ended)
        by_id = stopped[at].tolist()
        cut = [False] * len(at) if by_text is None else by_text[at].tolist()
        completions = [
            self._completion(*row) for row in zip(lanes.drawn(rows.start + at), by_id, cut, strict=True)
        ]
        gone = np.zeros(len(lanes), dtype=np.bool_)
        gone[rows] = ended
        groups = lanes.groups[gone].tolist()
        self.scheduler.finish(groups, lanes.slots[gone].tolist())
        if self.recorder:
            for group in filter(self.scheduler.finished, groups):
                self.recorder.forget(group)
        lanes.keep(~gone)
        return completions

    def _completion(self, drawn: Drawn, by_id: bool, by_text: bool) -> Completion:
        lane, group, sample, ids, logprobs, logprobs1 = drawn
        text = self.texts.pop(lane, None) if self.texts else None
        return Completion(
            prompt_id=self.prompts[group].id,
            index=sample,
            token_ids=tuple(ids),
            text=text.text if text and by_text else self.setup.chat.decode(ids[:-1] if by_id else ids),
            logprobs=tuple(logprobs),
            logprobs_t1=tuple(logprobs1),
            finish_reason="stop" if by_id or by_text else "length",
            weight_version=self.weight_version,
            routed_experts=self.recorder.take(group, lane, len(ids)) if self.recorder else None,
        )
