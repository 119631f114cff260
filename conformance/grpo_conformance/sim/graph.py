"""Graphs of the simulated device: what a capture recorded is computed again, on the same memory.

`torch.sim.SimGraph` and `torch.sim.graph` are to this device what `CUDAGraph` and `graph` are to torch.cuda.
A recorded operation runs again on the tensors that it had, and its results go where they were. What a chip
would do wrong in silence is an error here: an operation that makes the host wait, a copy to or from the host,
random numbers, and at a replay memory that was freed or moved since. Until the first replay the results hold
what unwritten memory holds, since a capture computes nothing on a chip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SIM = "sim"
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put"}
UNWRITTEN = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}
_capturing: list[SimGraph] = []


def is_current_stream_capturing() -> bool:
    """Whether a capture is under way."""
    return bool(_capturing)


@dataclass(frozen=True, slots=True)
class Outside:
    """A tensor that the graph reads or writes and does not own: its memory must be there, at its place."""

    storage: StorageWeakRef
    address: int
    like: tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]

    def tensor(self) -> Tensor:
        """The same view again. Raises RuntimeError for memory that is gone or elsewhere."""
        size, stride, offset, dtype, device = self.like
        storage: Any = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"a replayed graph uses memory that was freed: {dtype} {list(size)}")
        if storage.data_ptr() != self.address:
            raise RuntimeError(f"a replayed graph uses memory that has moved: {dtype} {list(size)}")
        return torch.empty(0, dtype=dtype, device=device).set_(storage, offset, size, stride)


@dataclass(frozen=True, slots=True)
class Work:
    """One recorded operation."""

    call: Any
    args: Any
    kwargs: Any
    results: tuple[tuple[int, Tensor], ...]
    """Those that the graph owns, with their places among all results."""

    def again(self) -> None:
        args, kwargs = tree_map(_inward, (self.args, self.kwargs))
        made = _tensors(self.call(*args, **kwargs))
        for place, result in self.results:
            result.copy_(made[place])


class SimGraph:
    """See `torch.cuda.CUDAGraph`, of which it has the methods that capture and replay need."""

    def __init__(self) -> None:
        self._tape = Tape()
        self._ready = False

    def capture_begin(self, pool: object = None) -> None:
        """Record what this thread computes from now on. `pool` changes nothing: memory is not reused here."""
        if _capturing:
            raise RuntimeError("a capture is under way already")
        _capturing.append(self)
        self._tape.__enter__()  # type: ignore[no-untyped-call]

    def capture_end(self) -> None:
        """Stop recording."""
        self._tape.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _capturing.remove(self)
        self._tape.spoil()
        self._ready = True

    def replay(self) -> None:
        """Compute everything again. Raises RuntimeError for memory that was freed or moved."""
        if not self._ready:
            raise RuntimeError("this graph has captured nothing")
        with torch.inference_mode():
            for work in self._tape.works:
                work.again()

    def reset(self) -> None:
        """Give the graph's memory back."""
        self._tape, self._ready = Tape(), False

    def pool(self) -> object:
        """What another capture may be given to share memory."""
        return id(self)


@contextlib.contextmanager
def graph(sim_graph: SimGraph, pool: object = None) -> Iterator[None]:
    """See `torch.cuda.graph`. A capture in which something was raised cannot be replayed."""
    whole = False
    sim_graph.capture_begin(pool)
    try:
        yield
        whole = True
    finally:
        sim_graph.capture_end()
        if not whole:
            sim_graph.reset()


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations and notes those that touch the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.works: list[Work] = []
        self._own: dict[int, Tensor] = {}
        """What came to be in the capture, by its storage."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        given = _tensors((args, kwargs))
        _refuse(func, given, kwargs.get("device"))
        made = func(*args, **kwargs)
        results = _tensors(made)
        kinds = {x.device.type for x in (*given, *results) if x.dim() or x.device.type == SIM}
        if len(kinds) > 1:
            raise RuntimeError(f"{func} in a capture copies between {' and '.join(sorted(kinds))}")
        if SIM in kinds:
            self._note(func, args, kwargs, given, results)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], results: list[Tensor]) -> None:
        known = {_key(x) for x in given} | self._own.keys()
        fresh = tuple((place, x) for place, x in enumerate(results) if _key(x) not in known)
        for _, x in fresh:
            self._own[_key(x)] = x
        # A view needs no work: it shows what its base holds.
        if func._schema.is_mutable or (fresh and func._schema.name not in UNWRITTEN):
            args, kwargs = tree_map(self._outward, (args, kwargs))
            self.works.append(Work(func, args, kwargs, fresh))

    def _outward(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or _key(x) in self._own:
            return x
        if x.device.type != SIM:
            return x.clone()
        storage = x.untyped_storage()
        like = (tuple(x.shape), x.stride(), int(x.storage_offset()), x.dtype, x.device)
        held = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return Outside(held, storage.data_ptr(), like)

    def spoil(self) -> None:
        """Let the results hold what unwritten memory holds."""
        with torch.inference_mode():
            for x in self._own.values():
                x.fill_(float("nan") if x.is_floating_point() else x.dtype == torch.bool or -1)


def _refuse(func: Any, given: list[Tensor], device: Any) -> None:
    """Raise RuntimeError for what a capture cannot record."""
    made_there = device is not None and torch.device(device).type == SIM
    if not made_there and not any(x.device.type == SIM for x in given):
        return
    if func._schema.name in INDEXING:
        if any(x.dtype in (torch.bool, torch.uint8) for x in given[1:]):
            raise RuntimeError(f"{func} in a capture counts a mask on the host")
    elif any(tag in func.tags for tag in WAITS):
        raise RuntimeError(f"{func} in a capture makes the host wait for the device")
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise RuntimeError(f"{func} in a capture draws random numbers, which this device does not record")


def _inward(x: Any) -> Any:
    return x.tensor() if isinstance(x, Outside) else x


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _key(x: Tensor) -> int:
    key: int = x.untyped_storage()._cdata
    return key
