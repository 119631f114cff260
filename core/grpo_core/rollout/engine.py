"""The native rollout engine: continuous batching over the bound ops, on any device."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, DataError, GrpoError
from ..model.checkpoint_io import read_tensors
from .caches import make_cache, plan_cache
from .decoder import make_decoder
from .graphs import GraphedDecoder
from .options import parse_options
from .recording import routed_shape
from .run import Counters, Run
from .weights import DecoderWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from ..types import Completion, Prompt, Sampling
    from .base import RolloutSetup
    from .decoder import InferenceDecoder


class NativeRollout:
    """Implements `Rollout`.

    Weights come with `load_weights`; an engine that never got any reads the checkpoint's folder. After
    `sleep` it holds nothing, and `load_weights` alone wakes it.
    """

    def __init__(self, setup: RolloutSetup) -> None:
        self._setup = setup
        self._options = parse_options(setup.options)
        self._counters = Counters()
        self._weights = DecoderWeights(
            setup.weight_map, setup.backend.linear.packed, tied=setup.arch.tie_word_embeddings,
            device=setup.device, dtype=setup.dtype,
        )  # fmt: skip
        self._plan = plan_cache(setup, self._options)
        self._cache: Any = None
        self._decoder: InferenceDecoder | GraphedDecoder | None = None
        self._version = 0
        self._from_disk = True
        """No weights but those of the checkpoint's folder were ever held."""
        self._busy = False

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        """See `Rollout.generate`; also `DataError` for an empty prompt or an id outside of the vocabulary.

        One call at a time: the next one, and `load_weights` and `sleep`, wait until its iterator is used up
        or closed, and raise `GrpoError` before.
        """
        setup = self._setup
        check_prompts(prompts, setup.max_model_len, setup.arch.vocab_size)
        if "" in sampling.stop:
            raise ConfigError(
                "an empty stop string cannot be used",
                why="every completion would end before its first token",
                fix="remove it from rollout.stop",
            )
        return self._generate([prompt for prompt in prompts if prompt.seeds], sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Completion]:
        self._check_idle("generate")
        if not prompts:
            return
        decoder, cache = self._ready()
        self._busy = True
        try:
            if isinstance(decoder, GraphedDecoder):
                decoder.open(cache)
            run = Run(
                self._setup, decoder, cache, prompts, sampling, counters=self._counters,
                weight_version=self._version, cache_tokens=self._plan.room,
                prefill_tokens=self._options.prefill_tokens,
            )  # fmt: skip
            while not run.done:
                yield from run.advance()
        finally:
            with torch.inference_mode():
                cache.reset()
            self._busy = False

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.load_weights`. Also refuses values that are not finite; wakes the engine."""
        self._check_idle("load_weights")
        with torch.inference_mode():
            self._weights.load(tensors)
        self._version = version
        self._from_disk = False
        decoder, _ = self._ready()
        if isinstance(decoder, GraphedDecoder):
            decoder.follow()

    def sleep(self) -> None:
        """See `Rollout.sleep`."""
        self._check_idle("sleep")
        self._drop_decoder()
        self._weights.drop()
        if self._cache is not None:
            with torch.inference_mode():
                self._cache.release()

    def wake(self) -> None:
        """Take room for the cache again, and the checkpoint's weights where no others were ever loaded."""
        self._check_idle("wake")
        if self._weights.loaded or self._from_disk:
            self._ready()

    def close(self) -> None:
        """Free everything, a call under way included; the engine cannot be used afterwards."""
        self._drop_decoder()
        self._cache = None
        self._weights.drop()
        self._from_disk = False

    def describe(self) -> Mapping[str, Any]:
        """See `Rollout.describe`; `counters` hold the work done so far."""
        setup = self._setup
        return {
            "name": "native",
            "weight_version": self._version,
            "dtype": str(setup.dtype).removeprefix("torch."),
            "device": str(setup.device),
            "max_sequences": setup.max_sequences,
            "max_model_len": setup.max_model_len,
            "cache_tokens": self._plan.room,
            "state_rows": self._plan.rows,
            "prefill_tokens": self._options.prefill_tokens,
            "fused_step": setup.backend.attention.step is not None,
            "weight_bytes": self._weights.nbytes(),
            "cache_bytes": 0 if self._cache is None else self._cache.nbytes(),
            "graphs": self._decoder.describe() if isinstance(self._decoder, GraphedDecoder) else None,
            "counters": asdict(self._counters),
        }

    @torch.inference_mode()
    def _ready(self) -> tuple[InferenceDecoder | GraphedDecoder, Any]:
        """The decoder and its cache, made where they are not there."""
        if not self._weights.loaded:
            self._read_checkpoint()
        if self._cache is None:
            self._cache = make_cache(self._setup, self._plan)
        elif self._decoder is None:
            self._cache.restore()
        if self._decoder is None:
            self._decoder = self._make_decoder()
        return self._decoder, self._cache

    def _make_decoder(self) -> InferenceDecoder | GraphedDecoder:
        setup = self._setup
        decoder = make_decoder(
            setup.arch, setup.backend, self._weights, self._cache, max_model_len=setup.max_model_len,
            device=setup.device, router_dtype=getattr(torch, setup.router_dtype),
            consistent=setup.consistent,
        )  # fmt: skip
        if setup.capture is None:
            return decoder
        routed = routed_shape(setup.arch) if setup.record_experts else (0, 0)
        return GraphedDecoder(
            decoder, setup.capture, self._weights, max_rows=setup.max_sequences,
            max_model_len=setup.max_model_len, routed=routed, device=setup.device,
        )  # fmt: skip

    def _drop_decoder(self) -> None:
        if isinstance(self._decoder, GraphedDecoder):
            self._decoder.release()
        self._decoder = None

    def _read_checkpoint(self) -> None:
        if not self._from_disk:
            raise GrpoError(
                "the rollout engine has no weights",
                why="it sleeps, or was closed, and keeps no copy of weights that came from a trainer",
                fix="call load_weights before generate",
            )
        setup = self._setup
        kept, dtype = setup.weight_map.kept, setup.dtype
        tensors = read_tensors(Path(setup.model_path), wanted=lambda name: name not in kept, fp8_to=dtype)
        self._weights.load(tensors)

    def _check_idle(self, call: str) -> None:
        if self._busy:
            raise GrpoError(
                f"the rollout engine cannot {call} while completions are being generated",
                why="the iterator of an earlier generate call is neither used up nor closed",
                fix="read it to its end, or close() it, first",
            )


def check_prompts(prompts: Sequence[Prompt], max_model_len: int, vocab_size: int) -> None:
    """Raises `DataError` for a prompt that is empty, too long, or not of this model's tokens."""
    for prompt in prompts:
        length = len(prompt.token_ids)
        if not 0 < length < max_model_len:
            raise DataError(
                f"prompt {prompt.id} has {length} tokens",
                why=f"a prompt takes 1 to {max_model_len - 1}: one sequence holds {max_model_len} tokens"
                " (rollout max_model_len) and a completion at least one of them",
                fix="shorten the prompt, drop it (data.overlong: drop), or raise data.max_prompt_tokens",
            )
        if min(prompt.token_ids) < 0 or max(prompt.token_ids) >= vocab_size:
            raise DataError(
                f"prompt {prompt.id} holds a token id outside of 0..{vocab_size - 1}",
                why="the tokenizer and the model do not belong together",
                fix="use the tokenizer that was saved with the model",
            )
