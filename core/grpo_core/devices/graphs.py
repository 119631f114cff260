"""Graphs of devices whose torch module has them: work that is recorded once and then started by one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from ..ops.common import Common

T = TypeVar("T")
FEATURE = "graphs"
"""Feature of a device that has them, and with them a method `capture`."""
WARM_UPS = 2
"""Calls before a capture, so that nothing is built or loaded for the first time within it."""


@dataclass(slots=True, kw_only=True)
class TorchGraph:
    """Implements `Graph` over what torch gives for the device."""

    graph: Any
    """The vendor's graph: `replay()`, `reset()`, `pool()`."""
    bytes: int
    """Memory that the allocator took for it."""

    def replay(self, common: Common | None) -> None:
        """Do the recorded work again; the lengths on the host are of no use to it."""
        self.graph.replay()

    def nbytes(self) -> int:
        """See `Graph.nbytes`."""
        return self.bytes

    def release(self) -> None:
        """See `Graph.release`."""
        self.graph.reset()
        self.bytes = 0


def graph_class(module: Any) -> Any:
    """The class of graphs in a device's torch module: "<Name>Graph" beside a context `graph`; or None."""
    named = [name for name in dir(module) if name.endswith("Graph") and not name.startswith("_")]
    kinds = [getattr(module, name) for name in named if inspect.isclass(getattr(module, name))]
    return kinds[0] if kinds and hasattr(module, "graph") else None


def record(
    module: Any, call: Callable[[], T], *, beside: TorchGraph | None, **settings: Any
) -> tuple[T, TorchGraph]:
    """Call `call` twice on a stream of its own, then once more under capture.

    Returns what the captured call returned, whose tensors hold results after every replay, and the graph.
    `beside` is an earlier graph whose memory it may share: their results are then not kept apart. `settings`
    are the vendor's, for its context `graph`. `call` must do no harm when it is repeated.
    """
    module.synchronize()
    with module.stream(module.Stream()):
        for _ in range(WARM_UPS):
            call()
    module.synchronize()
    module.empty_cache()
    before = int(module.memory_reserved())
    graph = graph_class(module)()
    pool = None if beside is None else beside.graph.pool()
    with module.graph(graph, pool=pool, **settings):
        result = call()
    module.synchronize()
    return result, TorchGraph(graph=graph, bytes=max(int(module.memory_reserved()) - before, 0))
