"""Graphs of an NPU, whose attention takes lengths from the host: they are renewed before every replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch_npu

from grpo_core.devices.graphs import TorchGraph, record

if TYPE_CHECKING:
    from grpo_core.devices.base import Graph
    from grpo_core.ops.common import Common

T = TypeVar("T")
LENGTHS = ("actual_seq_lengths_kv", "actual_seq_kvlen")
"""Arguments of the two attention ops of a decode step that hold lengths of keys; each takes its own."""


@dataclass(frozen=True, slots=True)
class NpuGraph:
    """Implements `Graph`. torch_npu notes the attention calls of the capture, and enqueues them again with
    new lengths beside the replay, which waits for each."""

    held: TorchGraph

    def replay(self, common: Common | None) -> None:
        """See `Graph.replay`. Raises ValueError without lengths."""
        lengths = None if common is None else common.seqlens_k
        if lengths is None:
            raise ValueError("a graph of an NPU is replayed with the lengths of its sequences")
        self.held.graph.update(cpu_update_input=[dict.fromkeys(LENGTHS, lengths)])
        self.held.replay(None)

    def nbytes(self) -> int:
        """See `Graph.nbytes`."""
        return self.held.nbytes()

    def release(self) -> None:
        """See `Graph.release`."""
        self.held.release()


def capture(call: Callable[[], T], beside: Graph | None) -> tuple[T, Graph]:
    """See `GraphDevice.capture`."""
    earlier = beside.held if isinstance(beside, NpuGraph) else None
    result, held = record(torch_npu.npu, call, beside=earlier, auto_dispatch_capture=True)
    return result, NpuGraph(held)
