"""Decode steps as device graphs: recorded once for a number of rows, then started by one call.

A graph reads and writes the same memory in every replay, so that tokens, positions and slots are copied to
buffers of its own, and rows that a step does not fill do the work of a slot that nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, GrpoError
from ..ops.common import Common

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..devices.base import Graph
    from .batch import Pass
    from .decoder import InferenceDecoder
    from .scheduler import Slots
    from .weights import DecoderWeights

    Capture = Callable[..., tuple[Any, Graph]]
    """`GraphDevice.capture`."""

PAD_TOKENS = 1
"""Room of the slot for rows that a step does not fill; they are written at position 0."""


def rows_of_graph(rows: int) -> int:
    """Rows of the graph that serves a step of so many: each up to 8, then four sizes an octave (10, 12, 14,
    16, 20, ...), so that a fifth of the work at most is for nobody."""
    unit = 1 << max((rows - 1).bit_length() - 3, 0)
    return -(-rows // unit) * unit


@dataclass(slots=True, kw_only=True)
class Recorded:
    """One graph with what it returns."""

    graph: Graph
    logits_BV: Tensor


class GraphedDecoder:
    """A decoder whose steps are replayed: the calls of `InferenceDecoder`, and a few around them.

    Graphs are recorded when a number of rows comes up for the first time. They share memory, so that logits
    are lost with the next step. A graph reads the weights where they were: `follow` drops all graphs when one
    of them has moved.
    """

    def __init__(
        self, decoder: InferenceDecoder, capture: Capture, weights: DecoderWeights, *, max_rows: int,
        max_model_len: int, routed: tuple[int, int], device: torch.device,
    ) -> None:  # fmt: skip
        """`routed` is the shape [M, k] of a token's record of experts, or (0, 0)."""
        self._decoder = decoder
        self._capture = capture
        self._weights = weights
        self._most = max_model_len
        count = rows_of_graph(max_rows)
        self._inputs_3B = torch.zeros(3, count, dtype=torch.int64, device=device)
        """Tokens, positions and slots."""
        self._record_BMk = (
            torch.full((count, *routed), -1, dtype=torch.int16, device=device) if routed[0] else None
        )
        self._recorded: dict[tuple[int, bool], Recorded] = {}
        self._places = addresses(weights)
        self._pad = -1
        self.captures = 0
        """Graphs recorded since the decoder was made."""

    @torch.inference_mode()
    def open(self, cache: Slots) -> None:
        """Take the slot of rows that are not filled; before any other of a call of `generate`."""
        slot = cache.allocate(PAD_TOKENS)
        if slot is None:
            raise ConfigError(
                "the rollout cache has no room for the padding of device graphs",
                why="it holds no token at all",
                fix="raise rollout.options.cache_tokens, or set rollout.graph=off",
            )
        self._pad = slot

    def follow(self) -> None:
        """After new weights: drop the graphs where a weight is not where it was."""
        places = addresses(self._weights)
        if places != self._places:
            self.release()
            self._places = places

    def prefill(self, batch: Pass, record_TMk: Tensor | None = None) -> Tensor:
        """See `InferenceDecoder.prefill`."""
        return self._decoder.prefill(batch, record_TMk)

    def step(
        self, tokens_B: Tensor, positions_B: Tensor, slots_B: Tensor, record_BMk: Tensor | None = None,
        common: Common | None = None,
    ) -> Tensor:  # fmt: skip
        """See `InferenceDecoder.step`; the logits last until the next step."""
        rows = len(tokens_B)
        count = rows_of_graph(rows)
        recorded = self._recorded.get((count, record_BMk is not None))
        if recorded is None:
            recorded = self._record(count, routed=record_BMk is not None)
        for static_B, given_B in zip(self._inputs_3B, (tokens_B, positions_B, slots_B), strict=True):
            static_B[:rows].copy_(given_B)
        if rows < count:
            self._fill(slice(rows, count))
        recorded.graph.replay(self._padded(common, count - rows))
        if record_BMk is not None and self._record_BMk is not None:
            record_BMk.copy_(self._record_BMk[:rows])
        return recorded.logits_BV[:rows]

    def _record(self, count: int, *, routed: bool) -> Recorded:
        """A graph of `count` rows, recorded with all of them unfilled: its first calls change no sequence."""
        self._fill(slice(0, count))
        tokens_B, positions_B, slots_B = self._inputs_3B[:, :count]
        record_BMk = self._record_BMk[:count] if routed and self._record_BMk is not None else None

        def call() -> Tensor:
            # Made anew each time: what offers keep in it belongs to one pass.
            common = Common(seqlens_k=[1] * count, max_seqlen_k=self._most)
            return self._decoder.step(tokens_B, positions_B, slots_B, record_BMk, common)

        earlier = next(iter(self._recorded.values()), None)
        try:
            logits_BV, graph = self._capture(call, beside=None if earlier is None else earlier.graph)
        except RuntimeError as error:
            raise GrpoError(
                f"a decode step of {count} rows cannot be recorded in a device graph",
                why=(str(error).splitlines() or [type(error).__name__])[0],
                fix="set rollout.graph=off, and tell whoever made the op that declares `graph`",
            ) from error
        recorded = self._recorded[count, routed] = Recorded(graph=graph, logits_BV=logits_BV)
        self.captures += 1
        return recorded

    def _fill(self, rows: slice) -> None:
        self._inputs_3B[:2, rows] = 0
        self._inputs_3B[2, rows] = self._pad

    def _padded(self, common: Common | None, more: int) -> Common | None:
        if common is None or not more:
            return common

        def lengths() -> list[int] | None:
            known = common.seqlens_k
            return None if known is None else known + [1] * more

        return Common(seqlens_k=lengths, max_seqlen_k=self._most)

    def release(self) -> None:
        """Give the graphs' memory back."""
        for recorded in self._recorded.values():
            recorded.graph.release()
        self._recorded.clear()

    def nbytes(self) -> int:
        """Bytes held for graphs and their inputs."""
        held = self._inputs_3B.nbytes + (0 if self._record_BMk is None else self._record_BMk.nbytes)
        return held + sum(recorded.graph.nbytes() for recorded in self._recorded.values())

    def describe(self) -> dict[str, Any]:
        """Rows of the graphs held, bytes, and how many were recorded in all."""
        rows = sorted({count for count, _ in self._recorded})
        return {"rows": rows, "bytes": self.nbytes(), "captures": self.captures}


def addresses(weights: DecoderWeights) -> list[int]:
    """Where the weights lie. A packed layer keeps its place as long as it is the same object: an offer that
    a graph can record takes new values in place."""
    return [x.data_ptr() for x in weights.plain.values()] + [id(x) for x in weights.linears.values()]
