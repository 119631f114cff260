"""Groups of processes on the host, over torch.distributed's gloo: what collectives of a device can stand on.

Every call ends within the timeout given to `join`, with a `GrpoError` where a peer is gone.
"""

from __future__ import annotations

import pickle
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import ConfigError, GrpoError
from .collective_checks import check_members, check_place

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
KNOCK = 0.05
"""Seconds between two looks whether the first rank listens."""
PATIENCE, LOOK = 1e-3, 2e-5
"""Seconds of looking all the time whether a call is done, and then between two looks."""


class HostGroup:
    """Some ranks of the world. Tensors are contiguous and on the host; every member makes the same calls."""

    def __init__(self, ranks: Sequence[int], rank: int, handle: Any) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)
        self.size = len(self.ranks)
        self._handle = handle

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """In place; "sum", "max" or "min"."""
        options: Any = dist.AllreduceOptions()
        options.reduceOp = _OPS[op]
        within(lambda: self._handle.allreduce([x], options).wait(), "all_reduce")

    def all_gather(self, x: Tensor) -> Tensor:
        """[n, ...] -> [size * n, ...] in the order of ranks."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        if out.numel():
            within(lambda: self._handle.allgather([list(out.chunk(self.size))], [x]).wait(), "all_gather")
        return out

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """In place, from a rank within the group."""
        options: Any = dist.BroadcastOptions()
        options.rootRank = src
        within(lambda: self._handle.broadcast([x], options).wait(), "broadcast")

    def barrier(self) -> None:
        """Wait for everybody."""
        within(lambda: self._handle.barrier().wait(), "barrier")

    def all_to_all(self, x: Tensor, out: Tensor, sends: Sequence[int], receives: Sequence[int]) -> None:
        """Rows of x by destination, into `out` by source."""
        counts = list(receives), list(sends)
        within(lambda: self._handle.alltoall_base(out, x, *counts).wait(), "all_to_all")

    def gather_objects(self, obj: object) -> list[object]:
        """Pickles, padded to the longest."""
        mine = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([mine.shape[0]])).tolist()
        padded = mine.new_zeros(max(sizes))
        padded[: mine.shape[0]] = mine
        rows = self.all_gather(padded).view(self.size, -1)
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostWorld:
    """All ranks, met at a store. It owns torch's default process group until `leave`."""

    rank: int
    size: int
    store: Any
    timeout: timedelta
    made: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """How many groups of each set of ranks this rank has made."""

    def group(self, ranks: Sequence[int]) -> HostGroup:
        """Of ascending ranks of the world, this one among them; else ValueError. Only members call it."""
        check_members(ranks, self.rank, self.size)
        if len(ranks) == self.size:
            return HostGroup(ranks, self.rank, dist.group.WORLD)
        key = tuple(ranks)
        # torch.distributed.new_group takes a name from how many groups a process has made before, by which
        # members that were in unlike numbers of groups wait for one another at different doors.
        name = f"group {'-'.join(map(str, key))} {self.made[key]}"
        self.made[key] += 1
        gloo: Any = dist
        handle: list[Any] = []
        within(
            lambda: handle.append(
                gloo.ProcessGroupGloo(
                    gloo.PrefixStore(name, self.store), key.index(self.rank), len(key), self.timeout
                )
            ),
            name,
        )
        return HostGroup(key, self.rank, handle[0])


def join(*, rank: int, world: int, store: str, timeout: float) -> HostWorld:
    """Meet all ranks at "tcp://host:port" or "file:///path"; a failure leaves nothing behind.

    Raises ConfigError for a place or a store that is none and for a process that has a process group
    already, and GrpoError when a peer does not come within `timeout` seconds.
    """
    check_place(rank, world, timeout)
    if dist.is_initialized():
        raise ConfigError(
            "this process has a torch.distributed process group already",
            why="torch keeps one default group for each process",
            fix="close the earlier collectives before joining again",
        )
    limit = timedelta(seconds=timeout)
    opened: list[Any] = []

    def meet() -> None:
        opened.append(open_store(store, rank, world, limit))
        dist.init_process_group("gloo", store=opened[0], rank=rank, world_size=world, timeout=limit)
        dist.barrier()

    try:
        within(meet, f"joining through {store}")
    except GrpoError:
        leave()
        raise
    return HostWorld(rank=rank, size=world, store=opened[0], timeout=limit)


def leave() -> None:
    """Destroy torch's default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def open_store(store: str, rank: int, world: int, timeout: timedelta) -> Any:
    """The rendezvous store of "tcp://host:port" (rank 0 listens) or "file:///path"; else ConfigError."""
    stores: Any = dist  # torch's type stubs leave the stores out
    kind, _, place = store.partition("://")
    if kind == "file" and place.startswith("/") and Path(place).parent.is_dir():
        opened = stores.FileStore(place, world)
        opened.set_timeout(timeout)
        return opened
    host, _, port = place.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        if rank:
            _await_listener(host, int(port), timeout.total_seconds())
        return stores.TCPStore(host, int(port), world, is_master=rank == 0, timeout=timeout)
    raise ConfigError(
        f"{store!r} is no rendezvous store",
        why="processes meet at tcp://host:port or at file:///path in a folder that exists",
        fix="give every rank the same address",
    )


def within(call: Callable[[], object], what: str) -> None:
    """Run a blocking call of torch.distributed; its RuntimeError (timeout, lost peer) becomes GrpoError."""
    try:
        call()
    except (RuntimeError, ConnectionError) as error:
        raise _lost(what, (str(error).splitlines() or [type(error).__name__])[0][:300]) from error


def finish(
    start: Callable[[], Any], what: str, group: HostGroup, limit: timedelta,
    give_up: Callable[[], object] | None = None,
) -> None:  # fmt: skip
    """Start a call of a device's library, which returns before it is done, and wait for it on the host.

    Raises GrpoError when it fails; and when it takes longer than `limit`, after `give_up`.
    """
    work: list[Any] = []
    within(lambda: work.append(start()), what)
    begun = time.monotonic()
    while not work[0].is_completed():
        waited = time.monotonic() - begun
        if waited > limit.total_seconds():
            if give_up is not None:
                give_up()
            raise _lost(what, f"rank {group.rank} of {group.size} waited {waited:.0f} s")
        if waited > PATIENCE:
            time.sleep(LOOK)
    # The device's stream takes up the result; an error of the call is raised here.
    within(work[0].wait, what)


def _lost(what: str, why: str) -> GrpoError:
    return GrpoError(
        f"{what} failed: a peer did not answer or is gone", why=why,
        fix="look at the other ranks' output first; raise the timeout if one is only slow",
    )  # fmt: skip


def _await_listener(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens: a store's own client tries for more than twice its timeout."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), KNOCK)).close()
            return
        except OSError as error:
            if time.monotonic() + KNOCK >= deadline:
                raise ConnectionError(f"nobody listens at {host}:{port} after {seconds:.0f} s") from error
            time.sleep(KNOCK)
