"""Collectives of NPUs: HCCL for tensors, gloo beside it for objects, barriers and float64.

What HCCL lacks is emulated: "avg" is a sum and a division; float64 is reduced on the host; bool and uint8
travel as int8. Its calls return before they are done, and a watchdog would end the process of a rank
whose peer is gone: here the host waits for each call, so that it can raise within the timeout.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from torch import Tensor

from grpo_core.ops.collectives import Group
from grpo_core.ops.reference.collective_checks import (
    check_counts,
    check_members,
    check_place,
    check_reduction,
    check_shares,
    check_source,
)
from grpo_core.ops.reference.collectives import OneRank
from grpo_core.ops.reference.host_group import HostGroup, HostWorld, finish, join, leave, within

WORLD_BUFFER, GROUP_BUFFER = 200, 64
"""MB of HCCL's buffer for the world and for a smaller group; a communicator takes two of them on the NPU."""
GRACE = timedelta(seconds=60)
"""How much later than ours torch_npu's watchdog would end the process."""
_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_BYTES = (torch.bool, torch.uint8)


class HcclGroup:
    """See `grpo_core.ops.collectives.Group`. `handle` is HCCL's process group, `host` gloo's of the same
    ranks."""

    def __init__(self, host: HostGroup, handle: Any, timeout: timedelta) -> None:
        self.rank = host.rank
        self.size = host.size
        self._host, self._handle, self._timeout = host, handle, timeout

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """See `Group.all_reduce`. Raises ValueError for another op, and for "avg" of integers."""
        check_reduction(x, op)
        if not x.numel():
            return
        if x.dtype == torch.float64:
            flat = x.detach().cpu().contiguous()
            self._host.all_reduce(flat, op="sum" if op == "avg" else op)
        else:
            flat = x.detach().contiguous()
            options: Any = dist.AllreduceOptions()
            options.reduceOp = _OPS[op]
            self._do(lambda: self._handle.allreduce([flat], options), "all_reduce")
        if op == "avg":
            flat /= self.size
        if flat.data_ptr() != x.data_ptr():
            x.detach().copy_(flat)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group.all_gather`."""
        mine = _movable(x)
        out = mine.new_empty(self.size * x.shape[0], *x.shape[1:])
        if out.numel():
            self._do(lambda: self._handle._allgather_base(out, mine), "all_gather")
        return out.view(x.dtype)

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """See `Group.reduce_scatter`. Raises ValueError when the rows cannot be shared out evenly."""
        check_shares(x, self.size)
        check_reduction(x, op)
        rows = x.shape[0] // self.size
        if x.dtype == torch.float64:
            whole = x.clone()
            self.all_reduce(whole, op=op)
            return whole[self.rank * rows : (self.rank + 1) * rows].clone()
        given, out = x.detach().contiguous(), x.new_empty(rows, *x.shape[1:])
        options: Any = dist.ReduceScatterOptions()
        options.reduceOp = _OPS[op]
        if out.numel():
            self._do(lambda: self._handle._reduce_scatter_base(out, given, options), "reduce_scatter")
        return out.div_(self.size) if op == "avg" else out

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """See `Group.broadcast`. Raises ValueError for a rank outside of the group."""
        check_source(src, self.size)
        if not x.numel():
            return
        flat = _movable(x)
        options: Any = dist.BroadcastOptions()
        options.rootRank = src
        self._do(lambda: self._handle.broadcast([flat], options), "broadcast")
        if flat.data_ptr() != x.data_ptr():
            x.detach().copy_(flat.view(x.dtype))

    def barrier(self) -> None:
        """See `Group.barrier`."""
        self._host.barrier()

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """See `Group.all_to_all`. Raises ValueError for counts that do not fit the rows or the group."""
        check_counts(x, send_counts, recv_counts, self.size)
        rows = _movable(x)
        out = rows.new_empty(sum(recv_counts), *x.shape[1:])
        counts = list(recv_counts), list(send_counts)
        self._do(lambda: self._handle.alltoall_base(out, rows, *counts), "all_to_all")
        return out.view(x.dtype)

    def gather_objects(self, obj: object) -> list[object]:
        """See `Group.gather_objects`."""
        return self._host.gather_objects(obj)

    def _do(self, start: Callable[[], Any], what: str) -> None:
        """Start a call and wait for it. Raises GrpoError when it fails or takes longer than the timeout."""
        finish(start, what, self._host, self._timeout)


def _movable(x: Tensor) -> Tensor:
    """The same bytes, side by side, in a dtype that HCCL moves."""
    flat = x.detach().contiguous()
    if flat.dtype in _BYTES:
        return flat.view(torch.int8)
    # Eight bytes a number, whatever they mean.
    return flat.view(torch.int64) if flat.dtype == torch.float64 else flat


class Hccl:
    """See `grpo_core.ops.collectives.Collectives`. Ranks meet over gloo, which is torch's default group."""

    backend = "hccl"
    reduce_ops = frozenset({"sum", "max", "min"})

    def __init__(self) -> None:
        self._rank, self._size = -1, 0
        self._world: HostWorld | None = None
        self._made: Counter[tuple[int, ...]] = Counter()

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
        name = f"hccl {'-'.join(map(str, key))} {self._made[key]}"
        self._made[key] += 1
        buffer = WORLD_BUFFER if host.size == self._size else GROUP_BUFFER
        made: list[Any] = []
        within(lambda: made.append(process_group(self._world, key, name, buffer)), name)
        return HcclGroup(host, made[0], self._world.timeout)

    def close(self) -> None:
        """Leave; a second call does nothing."""
        self._rank, self._size, self._world = -1, 0, None
        self._made.clear()
        leave()


def process_group(world: Any, ranks: tuple[int, ...], name: str, buffer_mb: int) -> Any:
    """HCCL's process group of some ranks, made as torch_npu itself makes it, with buffers of this size.

    It connects in its first call, and waits long for a rank that died before: now everybody is there.
    """
    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options._timeout = world.timeout + GRACE
    options.global_ranks_in_group = list(ranks)
    options.group_id = name
    # Releases that do not know a key pass it over; then the host's own wait is what ends a call.
    seconds = math.ceil(world.timeout.total_seconds())
    options.hccl_config = {"hccl_buffer_size": buffer_mb, "hccl_exec_timeout": seconds}
    stores: Any = dist
    store = stores.PrefixStore(name, world.store)
    rank, size = ranks.index(world.rank), len(ranks)
    made = torch_npu._C._distributed_c10d.ProcessGroupHCCL(store, rank, size, options)
    made.allreduce([torch.zeros(1, dtype=torch.int32, device="npu")]).wait()
    return made
