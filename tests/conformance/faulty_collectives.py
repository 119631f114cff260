"""Collectives that are wrong in one known way each, for the tests of the level that must see it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference.host_group import HostGroup, join
from grpo_cpu.collectives import Gloo, GlooGroup


class Faulty(GlooGroup):
    """A right group, to be spoilt."""


def offer(faulty: type[Faulty]) -> type[Gloo]:
    """Collectives whose groups are of another class."""

    class Spoilt(Gloo):
        def group(self, ranks: Sequence[int]) -> GlooGroup:
            return faulty(super().group(ranks)._host)

    return Spoilt


class Transposed(Faulty):
    """Rows go by the counts that were meant for receiving, padded and cut to what the callers expect."""

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        got = super().all_to_all(x, send_counts=send_counts, recv_counts=recv_counts)
        # By destination instead of by source: what came is put together in the order of the other counts.
        starts = [sum(recv_counts[:rank]) for rank in range(self.size)]
        order = sorted(range(self.size), key=lambda rank: send_counts[rank])
        return torch.cat([got[starts[rank] : starts[rank] + recv_counts[rank]] for rank in order])


class CountsSwapped(Faulty):
    """Hands the counts over in the wrong order."""

    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        out = x.new_empty(sum(recv_counts), *x.shape[1:])
        self._host.all_to_all(x.contiguous(), out, recv_counts, send_counts)
        return out


class Undivided(Faulty):
    """An average without the division."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        super().all_reduce(x, op="sum" if op == "avg" and x.is_floating_point() else op)


class Reciprocal(Faulty):
    """An average by a rounded reciprocal: near, and not the sum and the division that it stands for."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        if op != "avg" or not x.is_floating_point():
            return super().all_reduce(x, op=op)
        super().all_reduce(x, op="sum")
        x.mul_(torch.tensor(1.0 / self.size).to(x.dtype))
        return None


class Coarse(Faulty):
    """Sums float32 in bfloat16."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        if x.dtype != torch.float32 or op in ("max", "min"):
            return super().all_reduce(x, op=op)
        rounded = x.bfloat16()
        super().all_reduce(rounded, op=op)
        x.copy_(rounded)
        return None


class FloatedIntegers(Faulty):
    """Sums integers as floats."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        if x.dtype != torch.int64 or op != "sum":
            return super().all_reduce(x, op=op)
        rounded = x.double()
        super().all_reduce(rounded, op=op)
        x.copy_(rounded)
        return None


class ForgetsStrides(Faulty):
    """Reduces the copy of a strided view and leaves the view."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        super().all_reduce(x.contiguous(), op=op)


class Unequal(Faulty):
    """The last rank adds up in float32 and the others in float64: both right, and not the same."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        if x.dtype != torch.float32 or op != "sum":
            return super().all_reduce(x, op=op)
        wide = x.double()
        super().all_reduce(wide, op=op)
        super().all_reduce(x, op=op)
        if self.rank < self.size - 1:
            x.copy_(wide)
        return None


class Restless(Faulty):
    """The last bit depends on the clock."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        super().all_reduce(x, op=op)
        if x.dtype == torch.float32 and op == "sum":
            x.mul_(1 + 2.0**-23 * (time.time_ns() // 1000 % 5))


class InputGone(Faulty):
    """Scatters in place."""

    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        share = super().reduce_scatter(x, op=op)
        x.zero_()
        return share


class NanLost(Faulty):
    """Takes what is not finite for nothing."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        if x.is_floating_point():
            x.nan_to_num_(0.0, 0.0, 0.0)
        super().all_reduce(x, op=op)


class WrongOrder(Faulty):
    """Gathers with this rank first."""

    def all_gather(self, x: Tensor) -> Tensor:
        return super().all_gather(x).view(self.size, -1).roll(-self.rank, 0).view(-1, *x.shape[1:])


class NoBarrier(Faulty):
    """Waits for nobody."""

    def barrier(self) -> None:
        return None


class Accepts(Faulty):
    """Takes an op that it does not know for a sum."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        super().all_reduce(x, op=op if op in ("sum", "max", "min", "avg") else "sum")


class Hangs(Faulty):
    def all_gather(self, x: Tensor) -> Tensor:
        time.sleep(600)
        return x


class Crashes(Faulty):
    def broadcast(self, x: Tensor, *, src: int) -> None:
        os.abort()


class LostGroup(Gloo):
    """A group of some ranks is the group of all where it has two or more."""

    def group(self, ranks: Sequence[int]) -> GlooGroup:
        assert self._world is not None
        made = super().group(ranks)
        if made.size == 1 or made.size == self._world.size:
            return made
        host: Any = self._world.group(range(self._world.size))
        return GlooGroup(HostGroup(range(self._world.size), host.rank, host._handle))


class Patient(Gloo):
    """Waits for ever: the timeout is not handed on."""

    def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
        self._world = join(rank=rank, world=world, store=store, timeout=1000.0)


class AbortsOnLoss(Faulty):
    """A peer that is gone ends this process too."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        try:
            super().all_reduce(x, op=op)
        except Exception:  # noqa: BLE001
            os.abort()


class SilentLoss(Faulty):
    """A peer that is gone is not told."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        try:
            super().all_reduce(x, op=op)
        except Exception:  # noqa: BLE001
            return None

    def barrier(self) -> None:
        try:
            super().barrier()
        except Exception:  # noqa: BLE001
            return None


class OddError(Faulty):
    """A peer that is gone raises what no caller looks for."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        try:
            super().all_reduce(x, op=op)
        except Exception:  # noqa: BLE001
            raise KeyError("peer") from None


class StaysAfterClose(Gloo):
    """Leaves, and cannot come back."""

    def close(self) -> None:
        self._world = None


transposed = offer(Transposed)
swapped = offer(CountsSwapped)
undivided = offer(Undivided)
reciprocal = offer(Reciprocal)
coarse = offer(Coarse)
floated = offer(FloatedIntegers)
strides = offer(ForgetsStrides)
unequal = offer(Unequal)
restless = offer(Restless)
input_gone = offer(InputGone)
nan_lost = offer(NanLost)
wrong_order = offer(WrongOrder)
no_barrier = offer(NoBarrier)
accepts = offer(Accepts)
hangs = offer(Hangs)
crashes = offer(Crashes)
aborts = offer(AbortsOnLoss)
silent_loss = offer(SilentLoss)
odd_error = offer(OddError)
