"""Graphs of an NPU over a stand-in for torch_npu's: lengths of keys are renewed before every replay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_core.ops.common import Common


class NPUGraph:
    """Notes what is asked of it, as `torch.npu.NPUGraph` takes it."""

    said: list[Any]

    def __init__(self) -> None:
        self.said = []

    def update(self, cpu_update_input: list[dict[str, Any]]) -> None:
        self.said.append(cpu_update_input)

    def replay(self) -> None:
        self.said.append("replay")

    def reset(self) -> None:
        self.said.append("reset")

    def pool(self) -> str:
        return "pool"


@pytest.fixture
def npu(ascend: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    asked: list[Any] = []

    @contextlib.contextmanager
    def graph(npu_graph: NPUGraph, pool: Any = None, auto_dispatch_capture: bool = False) -> Iterator[None]:
        asked.append((pool, auto_dispatch_capture))
        yield

    module = SimpleNamespace(
        NPUGraph=NPUGraph, graph=graph, stream=lambda stream: contextlib.nullcontext(), Stream=object,
        synchronize=lambda: None, empty_cache=lambda: None, memory_reserved=lambda: 0, asked=asked,
    )  # fmt: skip
    monkeypatch.setattr(ascend.graph.torch_npu, "npu", module, raising=False)
    return module


def test_lengths_of_keys_are_renewed_before_each_replay(ascend: Any, npu: Any) -> None:
    result, graph = ascend.graph.capture(lambda: "logits", None)
    assert result == "logits" and npu.asked == [(None, True)]
    for lengths in ([3, 1], [4, 2]):
        graph.replay(Common(seqlens_k=lengths, max_seqlen_k=64))
        renewed, last = graph.held.graph.said[-2:]
        # torch_npu gives one dictionary to every call that it noted; each takes the name that it knows.
        assert last == "replay" and renewed == [
            {"actual_seq_lengths_kv": lengths, "actual_seq_kvlen": lengths}
        ]
    with pytest.raises(ValueError, match="lengths of its sequences"):
        graph.replay(None)
    graph.release()
    assert graph.held.graph.said[-1] == "reset"


def test_a_second_graph_shares_the_memory_of_the_first(ascend: Any, npu: Any) -> None:
    _, first = ascend.graph.capture(lambda: None, None)
    ascend.graph.capture(lambda: None, first)
    assert npu.asked[-1] == ("pool", True)


def test_block_tables_of_recorded_steps_have_one_width(ascend: Any) -> None:
    from grpo_core.ops.attention import CacheSpec

    spec = CacheSpec(num_layers=1, num_key_value_heads=1, head_dim=16, v_head_dim=16, dtype=torch.float32,
                     device=torch.device("cpu"), max_slots=3, max_tokens=600)  # fmt: skip
    cache = ascend.infer.KeyValueCache(spec)
    slots = torch.tensor([cache.allocate(300), cache.allocate(5)])
    table = cache.layers[0].table
    widths = [
        table.block_table(0, slots, lengths, Common(seqlens_k=lengths, max_seqlen_k=300)).shape[1]
        for lengths in ([1, 1], [300, 5])
    ]
    assert widths == [3, 3] and table.block_table(0, slots, [1, 1]).shape[1] == 1
