"""Collectives of the simulated device: gloo on host aliases of its tensors, without an average of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_core.errors import ConfigError, GrpoError
from grpo_core.ops.collectives import Group
from grpo_core.ops.reference.collectives import OneRank, check_reduce_op

from .runtime import NAME, ops

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_HALVES = (torch.bfloat16, torch.float16)


class SimGroup:
    """See `grpo_core.ops.collectives.Group`. Halves are reduced in float32 and rounded once; "avg" is a sum
    and a division. A tensor that is not on the simulated device raises ValueError."""

    def __init__(self, ranks: Sequence[int], rank: int, handle: Any) -> None:
        self.ranks = tuple(ranks)
        self.rank = self.ranks.index(rank)
        self.size = len(self.ranks)
        self._handle = handle

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """See `Group.all_reduce`. Raises ValueError for "avg" of integers."""
        check_reduce_op(op)
        if op == "avg" and not x.is_floating_point():
            raise ValueError(f"an average of {x.dtype} would be rounded: reduce a sum and divide")
        wide = (x.float() if x.dtype in _HALVES else x).contiguous()
        self._run("all_reduce", lambda: dist.all_reduce(_alias(wide), op=_OPS[op], group=self._handle))
        if op == "avg":
            wide.div_(self.size)
        if wide is not x:
            x.copy_(wide)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group.all_gather`."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        parts, mine = list(_alias(out).chunk(self.size)) if out.numel() else [], _alias(x.contiguous())
        if parts:
            self._run("all_gather", lambda: dist.all_gather(parts, mine, group=self._handle))
        return out

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """See `Group.reduce_scatter`. Raises ValueError when the rows cannot be shared out evenly."""
        if x.shape[0] % self.size:
            raise ValueError(f"{x.shape[0]} rows cannot be shared out over {self.size} ranks")
        whole, rows = x.clone(), x.shape[0] // self.size
        self.all_reduce(whole, op=op)
        return whole[self.rank * rows : (self.rank + 1) * rows].clone()

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """See `Group.broadcast`. Raises ValueError for a rank outside of the group."""
        if not 0 <= src < self.size:
            raise ValueError(f"a group of {self.size} ranks has no rank {src}")
        flat = x.contiguous()
        self._run("broadcast", lambda: dist.broadcast(_alias(flat), src=self.ranks[src], group=self._handle))
        if flat is not x:
            x.copy_(flat)

    def barrier(self) -> None:
        """See `Group.barrier`."""
        self._run("barrier", lambda: dist.barrier(group=self._handle))

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """See `Group.all_to_all`. Raises ValueError for counts that do not fit the rows or the group."""
        sends, receives = list(send_counts), list(recv_counts)
        if len(sends) != self.size or len(receives) != self.size or sum(sends) != x.shape[0]:
            raise ValueError(f"{x.shape[0]} rows against counts {sends} and {receives} for {self.size} ranks")
        out = x.new_empty(sum(receives), *x.shape[1:])
        to, rows = _alias(out), _alias(x.contiguous())
        self._run("all_to_all", lambda: dist.all_to_all_single(to, rows, receives, sends, group=self._handle))
        return out

    def gather_objects(self, obj: object) -> list[object]:
        """See `Group.gather_objects`."""
        gathered: list[object] = [None] * self.size
        self._run("gather_objects", lambda: dist.all_gather_object(gathered, obj, group=self._handle))
        return gathered

    def _run(self, what: str, call: Callable[[], object]) -> None:
        """Queued work of the device comes first."""
        ops.synchronize(ops.current_device())
        _within(call, what)


class SimCollectives:
    """See `grpo_core.ops.collectives.Collectives`. Owns torch's default process group while it is open."""

    backend = "sim-gloo"
    reduce_ops = frozenset({"sum", "max", "min"})

    def __init__(self) -> None:
        self.rank, self.world, self.joined = -1, 0, False

    def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
        """See `Collectives.init`. Raises ConfigError for a store that is neither tcp:// nor file://, for a
        rank outside of the world, and when this process has a process group already. A process alone needs
        no store and makes no process group."""
        if not 0 <= rank < world or not timeout > 0:
            raise ConfigError(
                f"rank {rank} of {world} cannot join with a timeout of {timeout} s",
                why="ranks go from 0 to world - 1 and the timeout is above 0",
                fix="give each process its own rank",
            )
        if world == 1 and not store:
            self.rank, self.world = rank, world
            return
        if dist.is_initialized():
            raise ConfigError(
                "this process has a torch.distributed process group already",
                why="torch keeps one default group for each process",
                fix="close the earlier collectives before joining again",
            )
        limit = timedelta(seconds=timeout)

        def join() -> None:
            opened = _store(store, rank, world, limit)
            dist.init_process_group("gloo", store=opened, rank=rank, world_size=world, timeout=limit)
            dist.barrier()

        try:
            _within(join, f"joining through {store}")
        except GrpoError:
            self.close()
            raise
        self.rank, self.world, self.joined = rank, world, True

    def group(self, ranks: Sequence[int]) -> Group:
        """See `Collectives.group`; members call it, others need not. Raises ValueError for ranks that are
        not ascending ranks of the world with this one among them."""
        wanted = list(ranks)
        ascending = wanted == sorted(set(wanted))
        if not ascending or self.rank not in wanted or not set(wanted) <= set(range(self.world)):
            raise ValueError(f"rank {self.rank} of {self.world} cannot make a group of {wanted}")
        if not self.joined:
            return OneRank()
        if wanted == list(range(self.world)):
            return SimGroup(wanted, self.rank, dist.group.WORLD)
        made: list[Any] = []
        _within(lambda: made.append(dist.new_group(wanted, use_local_synchronization=True)), "group")
        return SimGroup(wanted, self.rank, made[0])

    def close(self) -> None:
        """Leave; a second call does nothing."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.rank, self.world, self.joined = -1, 0, False


def _alias(x: Tensor) -> Tensor:
    if x.device.type != NAME:
        raise ValueError(f"collectives of {NAME} were given a tensor on {x.device}")
    alias: Tensor = ops.host_alias(x.detach())
    return alias


def _store(store: str, rank: int, world: int, timeout: timedelta) -> Any:
    kind, _, place = store.partition("://")
    if kind == "file" and place.startswith("/") and Path(place).parent.is_dir():
        opened: Any = dist.FileStore(place, world)
        opened.set_timeout(timeout)
        return opened
    host, _, port = place.rpartition(":")
    if kind == "tcp" and host and port.isdigit():
        return dist.TCPStore(host, int(port), world, is_master=rank == 0, timeout=timeout)
    raise ConfigError(
        f"{store!r} is no rendezvous store",
        why="processes meet at tcp://host:port or at file:///path in a folder that exists",
        fix="give every rank the same address",
    )


def _within(call: Callable[[], object], what: str) -> None:
    """Run a blocking call of torch.distributed; its RuntimeError (timeout, lost peer) becomes GrpoError."""
    try:
        call()
    except (RuntimeError, ConnectionError) as error:
        raise GrpoError(
            f"{what} failed: a peer did not answer or is gone",
            why=(str(error).splitlines() or [type(error).__name__])[0][:300],
            fix="look at the other ranks' output first; raise the timeout if one is only slow",
        ) from error
