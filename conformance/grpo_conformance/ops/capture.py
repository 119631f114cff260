"""Device graphs, as far as torch has a common way to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from grpo_core.plugins import Raised, attempt

WARM_UPS = 3
"""Calls before a capture, so that nothing is built or allocated for the first time in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """How work on a device is captured."""

    make: Callable[[], Any]
    """An empty graph with `replay()`."""
    capturing: Callable[[Any], Any]
    """A context in which all work goes into that graph."""
    aside: Callable[[], Any] = nullcontext
    """A context on a stream of its own, for the calls before."""

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
        """(what the call returned, the replay, after which those same tensors hold the new results)."""
        with self.aside():
            for _ in range(WARM_UPS):
                call()
        graph = self.make()
        with self.capturing(graph):
            returned = call()
        return returned, graph.replay


def graphs_of(type: str) -> Graphs | str:
    """The graphs of a torch device type; or in words why there are none.

    Looked for are `<Name>Graph` and `graph` in the device's module (`torch.get_device_module`), and then
    `torch.accelerator.Graph`, which newer versions of torch have for all that register one.
    """
    module = attempt(lambda: torch.get_device_module(type))
    if isinstance(module, Raised):
        return f"torch has no module for the device type {type}"
    named = [name for name in dir(module) if name.endswith("Graph")]
    kinds = [name for name in named if inspect.isclass(getattr(module, name))]
    if kinds and hasattr(module, "graph"):
        return Graphs(make=getattr(module, kinds[0]), capturing=module.graph, aside=lambda: _aside(module))
    common = getattr(torch.accelerator, "Graph", None) if hasattr(torch, "accelerator") else None
    current = attempt(lambda: torch.accelerator.current_accelerator())
    if common is not None and isinstance(current, torch.device) and current.type == type:
        made = attempt(common)
        if not isinstance(made, Raised):
            return Graphs(make=common, capturing=lambda graph: graph)
    return f"torch {torch.__version__} has no graphs for the device type {type}"


def _aside(module: Any) -> Any:
    return module.stream(module.Stream())
