"""Faults of collectives. Each is the same on every rank, so that no rank waits for another because of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_core.errors import GrpoError


class _Group:
    """A group that passes everything on."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.rank, self.size = inner, inner.rank, inner.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _grouped(kind: type) -> Callable[[type], type]:
    """Collectives whose groups are of a kind."""

    def made_from(healthy: type) -> type:
        class Faulty(healthy):  # type: ignore[misc]
            def group(self, ranks: Sequence[int]) -> Any:
                return kind(super().group(ranks))

        return Faulty

    return made_from


class _Transposed(_Group):
    def all_to_all(self, x: Tensor, *, send_counts: Sequence[int], recv_counts: Sequence[int]) -> Tensor:
        """Rows go by the counts that should come, where both add up to as many."""
        right: Tensor = self.inner.all_to_all(x, send_counts=send_counts, recv_counts=recv_counts)
        told = self.inner.gather_objects((x.cpu(), list(send_counts), list(recv_counts)))
        if any(sum(sends) != sum(receives) for _, sends, receives in told):
            return right
        blocks = [rows.split(receives)[self.rank] for rows, _, receives in told]
        sent = torch.cat(blocks).to(x.device)
        return sent if len(sent) == len(right) else right


class _Undivided(_Group):
    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """An average is a sum."""
        if op == "avg" and not x.is_floating_point():
            raise ValueError("an average of integers")
        self.inner.all_reduce(x, op="sum" if op == "avg" else op)


class _FirstRoot(_Group):
    def broadcast(self, x: Tensor, *, src: int) -> None:
        """From the first rank, if the root is one."""
        self.inner.broadcast(x, src=0 if 0 <= src < self.size else src)


class _Reversed(_Group):
    def all_gather(self, x: Tensor) -> Tensor:
        """The last rank's rows first."""
        return torch.cat(self.inner.all_gather(x).chunk(self.size)[::-1]) if len(x) else x.clone()


class _NextShare(_Group):
    def reduce_scatter(self, x: Tensor, *, op: str) -> Tensor:
        """The share of the rank behind this one."""
        rows = x.shape[0] // self.size
        return self.inner.reduce_scatter(x.roll(-rows, 0) if len(x) else x, op=op)  # type: ignore[no-any-return]


class _Compressed(_Group):
    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """float32 travels as bfloat16."""
        if x.dtype == torch.float32 and op in ("sum", "avg"):
            x.copy_(x.bfloat16())
        self.inner.all_reduce(x, op=op)


class _Rounded(_Group):
    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """Integers are added up as float32."""
        if x.is_floating_point() or op == "avg":
            self.inner.all_reduce(x, op=op)
            return
        wide = x.float()
        self.inner.all_reduce(wide, op=op)
        x.copy_(wide)


class _Open(_Group):
    def barrier(self) -> None:
        """Waits for nobody."""


class _Contiguous(_Group):
    def broadcast(self, x: Tensor, *, src: int) -> None:
        """A tensor whose rows are not in one piece gets nothing back."""
        self.inner.broadcast(x.contiguous(), src=src)


class _OwnBits(_Group):
    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """Every rank adds up in an order of its own."""
        self.inner.all_reduce(x, op=op)
        if x.dtype == torch.float32 and op == "sum" and self.rank:
            x.copy_(torch.nextafter(x.cpu(), 2 * x.cpu()))


class _Deadly(_Group):
    """A lost peer ends this process too, as a watchdog does."""

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        _or_die(lambda: self.inner.all_reduce(x, op=op))

    def barrier(self) -> None:
        _or_die(self.inner.barrier)


def _or_die(call: Callable[[], None]) -> None:
    try:
        call()
    except GrpoError:
        os._exit(6)


class _Accepting(_Group):
    def all_reduce(self, x: Tensor, *, op: str) -> None:
        """An op that it does not know is a sum."""
        self.inner.all_reduce(x, op=op if op in ("sum", "max", "min", "avg") else "sum")


counts_transposed = _grouped(_Transposed)
average_without_division = _grouped(_Undivided)
broadcast_from_the_first = _grouped(_FirstRoot)
gathered_backwards = _grouped(_Reversed)
share_of_the_next = _grouped(_NextShare)
reduced_in_bfloat16 = _grouped(_Compressed)
integers_in_float32 = _grouped(_Rounded)
barrier_for_nobody = _grouped(_Open)
strided_target_lost = _grouped(_Contiguous)
bits_of_each_rank = _grouped(_OwnBits)
dies_with_a_peer = _grouped(_Deadly)
unknown_op_is_a_sum = _grouped(_Accepting)


def rank_of_the_world(healthy: type) -> type:
    """A group's members keep the ranks that they have in the world."""

    class Faulty(healthy):  # type: ignore[misc]
        def group(self, ranks: Sequence[int]) -> Any:
            made = _Group(super().group(ranks))
            made.rank = list(ranks)[made.rank]
            return made

    return Faulty


def timeout_ignored(healthy: type) -> type:
    """Waits for half an hour, whatever it was told."""

    class Patient(healthy):  # type: ignore[misc]
        def init(self, *, rank: int, world: int, store: str, timeout: float) -> None:
            super().init(rank=rank, world=world, store=store, timeout=1800.0)

    return Patient
