"""Rows between the ranks of an expert-parallel group, there and back, with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..collectives import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Who sends how many rows to whom, and the order in which the receiver keeps them."""

    group: Group
    send_counts: list[int]
    recv_counts: list[int]
    order_R: Tensor
    """Arrival number of each row kept here: rows arrive by source rank, and are kept by expert."""
    counts_X: Tensor
    """int64 [experts of this rank]."""

    def there(self, rows_NC: Tensor) -> Tensor:
        """Rows sorted by expert -> rows of this rank's experts, sorted by expert, then by source rank."""
        arrived_RC: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            rows_NC, self.group, self.send_counts, self.recv_counts
        )
        return arrived_RC.index_select(0, self.order_R)

    def back(self, rows_RC: Tensor) -> Tensor:
        """The inverse of `there`."""
        arrived_RC = rows_RC.index_select(0, inverse(self.order_R))
        rows_NC: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            arrived_RC, self.group, self.recv_counts, self.send_counts
        )
        return rows_NC


def plan_exchange(counts_X: Tensor, group: Group) -> Exchange:
    """Agree with the group on an exchange; `counts_X` are this rank's rows for each expert of the model.

    Raises ValueError when the experts cannot be shared out evenly.
    """
    experts = counts_X.shape[0]
    if experts % group.size:
        raise ValueError(f"{experts} experts cannot be shared out over {group.size} ranks")
    own = experts // group.size
    ones = [1] * group.size
    sent_SX = counts_X.view(group.size, own)
    got_SX = group.all_to_all(sent_SX, send_counts=ones, recv_counts=ones)
    experts_SX = torch.arange(own, device=counts_X.device).repeat(group.size)
    expert_R = experts_SX.repeat_interleave(got_SX.flatten())
    return Exchange(
        group=group,
        send_counts=sent_SX.sum(1).tolist(),
        recv_counts=got_SX.sum(1).tolist(),
        order_R=expert_R.argsort(stable=True),
        counts_X=got_SX.sum(0),
    )


def inverse(order_N: Tensor) -> Tensor:
    """The permutation that undoes `order_N`."""
    places_N = torch.empty_like(order_N)
    places_N[order_N] = torch.arange(order_N.shape[0], device=order_N.device)
    return places_N


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NC: Tensor, group: Group, send_counts: list[int], recv_counts: list[int]
    ) -> Tensor:
        ctx.group, ctx.send_counts, ctx.recv_counts = group, send_counts, recv_counts
        return group.all_to_all(rows_NC, send_counts=send_counts, recv_counts=recv_counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back = ctx.group.all_to_all(grads[0], send_counts=ctx.recv_counts, recv_counts=ctx.send_counts)
        return back, None, None, None
