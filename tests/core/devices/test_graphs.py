"""Recording a graph over what a device's torch module has: the order of the calls, and the memory it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_core.devices.graphs import WARM_UPS, TorchGraph, graph_class, record


class AcmeGraph:
    def __init__(self) -> None:
        self.replays, self.alive = 0, True

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.alive = False

    def pool(self) -> str:
        return f"pool of {id(self)}"


@pytest.fixture
def acme() -> Any:
    """A torch module that notes what is asked of it; a capture takes 1000 bytes."""
    said: list[str] = []
    held = [5000]

    @contextlib.contextmanager
    def graph(graph: AcmeGraph, pool: Any = None, **settings: Any) -> Iterator[None]:
        said.append(f"capture {pool} {settings}")
        held[0] += 1000
        yield
        said.append("captured")

    @contextlib.contextmanager
    def stream(made: str) -> Iterator[None]:
        said.append(f"on {made}")
        yield
        said.append("back")

    return SimpleNamespace(
        said=said, AcmeGraph=AcmeGraph, graph=graph, stream=stream, Stream=lambda: "a stream of its own",
        synchronize=lambda: said.append("wait"), empty_cache=lambda: said.append("empty"),
        memory_reserved=lambda: held[0],
    )  # fmt: skip


def test_a_capture_is_preceded_by_calls_on_another_stream(acme: Any) -> None:
    def call() -> int:
        acme.said.append("call")
        return len(acme.said)

    result, graph = record(acme, call, beside=None, mode="fast")
    assert acme.said == [
        "wait", "on a stream of its own", *["call"] * WARM_UPS, "back", "wait", "empty",
        "capture None {'mode': 'fast'}", "call", "captured", "wait",
    ]  # fmt: skip
    assert result == acme.said.index("captured") and graph.nbytes() == 1000
    graph.replay(None)
    assert graph.graph.replays == 1
    graph.release()
    assert graph.nbytes() == 0 and not graph.graph.alive


def test_a_graph_beside_another_shares_its_memory(acme: Any) -> None:
    _, first = record(acme, lambda: None, beside=None)
    record(acme, lambda: None, beside=first)
    assert f"capture {first.graph.pool()} {{}}" in acme.said
    assert isinstance(first, TorchGraph)


def test_the_class_of_graphs_is_found_by_its_name() -> None:
    assert graph_class(torch.cuda) is torch.cuda.CUDAGraph
    assert graph_class(SimpleNamespace(AcmeGraph=AcmeGraph)) is None
    assert graph_class(SimpleNamespace(graph=1)) is None
