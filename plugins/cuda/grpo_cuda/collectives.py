"""Collectives of GPUs: NCCL for tensors, gloo beside it for meeting, objects and barriers.

NCCL's own calls return before they are done, and a peer that is gone would be found out by a watchdog that
ends the process. Here the host waits for each call, so that it can raise within the timeout, and give the
communicator up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from grpo_core.ops.collectives import Group
from grpo_core.ops.reference.collective_checks import (
    REDUCE_OPS,
    check_counts,
    check_members,
    check_place,
    check_reduction,
    check_shares,
    check_source,
)
from grpo_core.ops.reference.collectives import OneRank
from grpo_core.ops.reference.host_group import HostGroup, HostWorld, finish, join, leave, within

GRACE = timedelta(seconds=60)
"""How much later than ours NCCL's watchdog would end the process."""
_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}


class NcclGroup:
    """See `grpo_core.ops.collectives.Group`. `handle` is NCCL's process group, `host` gloo's of the same
    ranks."""

    def __init__(self, host: HostGroup, handle: Any, timeout: timedelta) -> None:
        self.rank = host.rank
        self.size = host.size
        self._host, self._handle, self._timeout = host, handle, timeout
        self._nccl = handle.name() == Nccl.backend
        """Or gloo in its place, as on a host without GPUs: it has no average, and waits by itself."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """See `Group.all_reduce`. Raises ValueError for another op, and for "avg" of integers."""
        check_reduction(x, op)
        if not x.numel():
            return
        flat = x.detach().contiguous()
        options: Any = dist.AllreduceOptions()
        options.reduceOp = self._op(op)
        self._do(lambda: self._handle.allreduce([flat], options), "all_reduce")
        if op == "avg" and not self._nccl:
            flat /= self.size
        if flat.data_ptr() != x.data_ptr():
            x.detach().copy_(flat)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group.all_gather`."""
        mine = x.detach().contiguous()
        out = mine.new_empty(self.size * x.shape[0], *x.shape[1:])
        if out.numel():
            self._do(lambda: self._handle._allgather_base(out, mine), "all_gather")
        return out

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """See `Group.reduce_scatter`. Raises ValueError when the rows cannot be shared out evenly."""
        check_shares(x, self.size)
        check_reduction(x, op)
        given, out = x.detach().contiguous(), x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        options: Any = dist.ReduceScatterOptions()
        options.reduceOp = self._op(op)
        if out.numel():
            self._do(lambda: self._handle._reduce_scatter_base(out, given, options), "reduce_scatter")
        return out.div_(self.size) if op == "avg" and not self._nccl else out

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """See `Group.broadcast`. Raises ValueError for a rank outside of the group."""
        check_source(src, self.size)
        if not x.numel():
            return
        flat = x.detach().contiguous()
        options: Any = dist.BroadcastOptions()
        options.rootRank = src
        self._do(lambda: self._handle.broadcast([flat], options), "broadcast")
        if flat.data_ptr() != x.data_ptr():
            x.detach().copy_(flat)

    def barrier(self) -> None:
        """See `Group.barrier`."""
        self._host.barrier()

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """See `Group.all_to_all`. Raises ValueError for counts that do not fit the rows or the group."""
        check_counts(x, send_counts, recv_counts, self.size)
        rows = x.detach().contiguous()
        out = rows.new_empty(sum(recv_counts), *x.shape[1:])
        counts = list(recv_counts), list(send_counts)
        self._do(lambda: self._handle.alltoall_base(out, rows, *counts), "all_to_all")
        return out

    def gather_objects(self, obj: object) -> list[object]:
        """See `Group.gather_objects`."""
        return self._host.gather_objects(obj)

    def _op(self, op: str) -> Any:
        return _OPS["sum" if op == "avg" and not self._nccl else op]

    def _do(self, start: Callable[[], Any], what: str) -> None:
        """Start a call and wait for it. Raises GrpoError when it fails or takes longer than the timeout."""
        if self._nccl:
            finish(start, what, self._host, self._timeout, self.give_up)
        else:
            within(lambda: start().wait(), what)

    def give_up(self) -> None:
        """Stop NCCL's kernels, which would wait for ever and block all that comes after them."""
        if self._nccl:
            self._handle.abort()


class Nccl:
    """See `grpo_core.ops.collectives.Collectives`. Ranks meet over gloo, which is torch's default group."""

    backend = "nccl"
    reduce_ops = REDUCE_OPS

    def __init__(self) -> None:
        self._rank, self._size = -1, 0
        self._world: HostWorld | None = None
        self._made: Counter[tuple[int, ...]] = Counter()
        self._groups: list[NcclGroup] = []

    def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
        """See `Collectives.init`. Raises ConfigError for a store that is neither tcp:// nor file://, for a
        rank outside of the world, and when this process has a process group already. A process alone needs
        no store and makes no process group."""
        check_place(rank, world, timeout)
        if world > 1 or store:
            self._world = join(rank=rank, world=world, store=store, timeout=timeout)
        self._rank, self._size = rank, world

    def group(self, ranks: Sequence[int]) -> Group:
        """See `Collectives.group`. Raises ValueError for ranks that are not ascending ranks of the world with
        this one among them."""
        check_members(ranks, self._rank, self._size)
        if self._world is None:
            return OneRank()
        host = self._world.group(ranks)
        key = tuple(ranks)
        name = f"nccl {'-'.join(map(str, key))} {self._made[key]}"
        self._made[key] += 1
        made: list[Any] = []
        within(lambda: made.append(process_group(self._world, key, name)), name)
        self._groups.append(NcclGroup(host, made[0], self._world.timeout))
        return self._groups[-1]

    def close(self) -> None:
        """Leave; a second call does nothing."""
        self._rank, self._size, self._world = -1, 0, None
        self._made.clear()
        # Nothing is under way; a peer that is gone would be waited for otherwise.
        for group in self._groups:
            group.give_up()
        self._groups.clear()
        leave()


def process_group(world: Any, ranks: tuple[int, ...], name: str) -> Any:
    """NCCL's process group of some ranks. It connects with its first call."""
    stores: Any = dist
    options = stores.ProcessGroupNCCL.Options()
    options._timeout = world.timeout + GRACE
    options.global_ranks_in_group = list(ranks)
    options.group_name = name
    store = stores.PrefixStore(name, world.store)
    return stores.ProcessGroupNCCL(store, ranks.index(world.rank), len(ranks), options)
