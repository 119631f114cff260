"""Where the segments of a packed batch lie: on the host where a kernel's arguments need it, fetched once.

Kernels take the cumulative lengths as they are; what is derived from them is derived once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds, parent_list

T = TypeVar("T")


def shared(common: Common | None, key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, from an earlier layer of the pass where there is `common` to keep it."""
    return make() if common is None else common.once(("cuda", key), make)


def ends_of(cu_seqlens: Tensor, tokens: int, common: Common | None) -> Tensor:
    """The cumulative lengths as kernels want them: int32 and contiguous. Raises ValueError when they do not
    cover the tokens."""

    def make() -> Tensor:
        bounds(cu_seqlens, tokens, common)
        return cu_seqlens.to(torch.int32).contiguous()

    return shared(common, "ends", make)


def longest(cu_seqlens: Tensor, tokens: int, common: Common | None) -> int:
    """Tokens of the longest segment, on the host. Raises ValueError as `ends_of` does."""

    def make() -> int:
        return max((end - start for start, end in pairwise(bounds(cu_seqlens, tokens, common))), default=0)

    return shared(common, "longest", make)


def rows(max_seqlen: int) -> int:
    """`max_seqlen`, but not 1: the kernels then take every sequence to have a query; some may be empty."""
    return max(2, max_seqlen)


def cumulative(lengths_B: Tensor) -> Tensor:
    """int32 [B + 1] from 0."""
    ends = torch.zeros(lengths_B.shape[0] + 1, dtype=torch.int32, device=lengths_B.device)
    torch.cumsum(lengths_B, 0, dtype=torch.int32, out=ends[1:])
    return ends


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPlan:
    """Keys of each segment side by side: [its parent's | its own], and the way back."""

    rows_N: Tensor
    """int64: row of each key in the packed batch."""
    cu_seqlens_k: Tensor
    """int32 [S + 1]"""
    max_seqlen_k: int
    own_T: Tensor
    """int64: where each row of the batch lies among the keys as its own segment's."""
    shared_PJ: Tensor
    """int64: where rows of parents lie among their children's keys, N where there are fewer children."""
    at_T: Tensor
    """int64: line of `shared_PJ` that is about each row of the batch, P for rows of no parent."""


def key_plan(cu_seqlens: Tensor, parents: Tensor, tokens: int, common: Common | None) -> KeyPlan | None:
    """The plan of these segments; None where none has a parent with tokens. Raises ValueError as `bounds` and
    `parent_list` do."""

    def make() -> KeyPlan | None:
        ends = bounds(cu_seqlens, tokens, common)
        return make_plan(ends, parent_list(parents, len(ends) - 1, common), cu_seqlens.device)

    return shared(common, "keys", make)


def make_plan(ends: list[int], tree: list[int], device: torch.device) -> KeyPlan | None:
    """The plan from numbers on the host, on the device."""
    if all(parent < 0 or ends[parent] == ends[parent + 1] for parent in tree):
        return None
    rows: list[int] = []
    own: list[int] = []
    starts: dict[int, list[int]] = {}
    ends_k = [0]
    for segment, parent in enumerate(tree):
        if parent >= 0:
            starts.setdefault(parent, []).append(len(rows))
            rows.extend(range(ends[parent], ends[parent + 1]))
        own.extend(range(len(rows), len(rows) + ends[segment + 1] - ends[segment]))
        rows.extend(range(ends[segment], ends[segment + 1]))
        ends_k.append(len(rows))
    most = max(map(len, starts.values()))
    shared: list[list[int]] = []
    at = [-1] * ends[-1]
    for parent, first in starts.items():
        for offset in range(ends[parent + 1] - ends[parent]):
            at[ends[parent] + offset] = len(shared)
            shared.append([start + offset for start in first] + [len(rows)] * (most - len(first)))

    def tensor(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return KeyPlan(
        rows_N=tensor(rows),
        cu_seqlens_k=tensor(ends_k, torch.int32),
        max_seqlen_k=max(b - a for a, b in pairwise(ends_k)),
        own_T=tensor(own),
        shared_PJ=tensor(shared),
        at_T=tensor([place if place >= 0 else len(shared) for place in at]),
    )


def gather(x_TKD: Tensor, plan: KeyPlan) -> Tensor:
    """Keys or values in the order of the plan, [N, K, D]; gradients of a parent's rows are summed in float32,
    in the order of its children."""
    out: Tensor = _Gather.apply(x_TKD, plan)
    return out


class _Gather(torch.autograd.Function):
    """Only gathers, backward too: adding into rows is slow where its order must be fixed."""

    @staticmethod
    def forward(ctx: Any, x_TKD: Tensor, plan: KeyPlan) -> Tensor:
        ctx.plan = plan
        return x_TKD.index_select(0, plan.rows_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        g_NKD = grads[0]
        wide = torch.promote_types(g_NKD.dtype, torch.float32)
        padded = torch.cat([g_NKD, g_NKD.new_zeros(1, *g_NKD.shape[1:])])
        shared = g_NKD.new_zeros(plan.shared_PJ.shape[0] + 1, *g_NKD.shape[1:], dtype=wide)
        for column in plan.shared_PJ.unbind(1):
            shared[:-1] += padded.index_select(0, column)
        own = g_NKD.index_select(0, plan.own_T).to(wide)
        return own.add_(shared.index_select(0, plan.at_T)).to(g_NKD.dtype), None
