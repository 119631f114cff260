"""Collectives of the simulated device: gloo on host aliases of its tensors, without an average of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
from grpo_core.ops.reference.host_group import HostGroup, HostWorld, join, leave

from .runtime import NAME, ops

_HALVES = (torch.bfloat16, torch.float16)


class SimGroup:
    """See `grpo_core.ops.collectives.Group`. Halves are reduced in float32 and rounded once; "avg" is a sum
    and a division. A tensor that is not on the simulated device raises ValueError."""

    def __init__(self, host: HostGroup) -> None:
        self.ranks = host.ranks
        self.rank, self.size = host.rank, host.size
        self._host = host

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """See `Group.all_reduce`. Raises ValueError for "avg" of integers."""
        check_reduction(x, op)
        wide = (x.float() if x.dtype in _HALVES else x).contiguous()
        self._host.all_reduce(_alias(wide), op="sum" if op == "avg" else op)
        if op == "avg":
            wide.div_(self.size)
        if wide is not x:
            x.copy_(wide)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Group.all_gather`."""
        return self._host.all_gather(_alias(x.contiguous())).to(x.device)

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """See `Group.reduce_scatter`. Raises ValueError when the rows cannot be shared out evenly."""
        check_shares(x, self.size)
        whole, rows = x.clone(), x.shape[0] // self.size
        self.all_reduce(whole, op=op)
        return whole[self.rank * rows : (self.rank + 1) * rows].clone()

    def broadcast(self, x: Tensor, *, src: int) -> None:
        """See `Group.broadcast`. Raises ValueError for a rank outside of the group."""
        check_source(src, self.size)
        flat = x.contiguous()
        self._host.broadcast(_alias(flat), src=src)
        if flat is not x:
            x.copy_(flat)

    def barrier(self) -> None:
        """See `Group.barrier`."""
        ops.synchronize(ops.current_device())
        self._host.barrier()

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """See `Group.all_to_all`. Raises ValueError for counts that do not fit the rows or the group."""
        check_counts(x, send_counts, recv_counts, self.size)
        out = x.new_empty(sum(recv_counts), *x.shape[1:])
        self._host.all_to_all(_alias(x.contiguous()), _alias(out), send_counts, recv_counts)
        return out

    def gather_objects(self, obj: object) -> list[object]:
        """See `Group.gather_objects`."""
        return self._host.gather_objects(obj)


class SimCollectives:
    """See `grpo_core.ops.collectives.Collectives`. Owns torch's default process group while it is open."""

    backend = "sim-gloo"
    reduce_ops = frozenset({"sum", "max", "min"})

    def __init__(self) -> None:
        self.rank, self.size = -1, 0
        self._world: HostWorld | None = None

    def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
        """See `Collectives.init`. Raises ConfigError for a store that is neither tcp:// nor file://, for a
        rank outside of the world, and when this process has a process group already. A process alone needs
        no store and makes no process group."""
        check_place(rank, world, timeout)
        if world > 1 or store:
            self._world = join(rank=rank, world=world, store=store, timeout=timeout)
        self.rank, self.size = rank, world

    def group(self, ranks: Sequence[int]) -> Group:
        """See `Collectives.group`; members call it, others need not. Raises ValueError for ranks that are
        not ascending ranks of the world with this one among them."""
        check_members(ranks, self.rank, self.size)
        return OneRank() if self._world is None else SimGroup(self._world.group(list(ranks)))

    def close(self) -> None:
        """Leave; a second call does nothing."""
        self._world = None
        self.rank, self.size = -1, 0
        leave()


def _alias(x: Tensor) -> Tensor:
    """The memory of a tensor as the host sees it, what was queued for it done."""
    if x.device.type != NAME:
        raise ValueError(f"collectives of {NAME} were given a tensor on {x.device}")
    ops.synchronize(ops.current_device())
    alias: Tensor = ops.host_alias(x.detach())
    return alias
