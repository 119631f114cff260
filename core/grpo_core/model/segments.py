"""Shared prompts for layers with a recurrent state: prompts first, then what goes on from them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..ops.common import Common


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Segments in two generations: roots, which start from nothing, and children, which go on from a root."""

    order_T: Tensor | None
    """int64; the tokens of all roots, then of all children. None where they stand like that already."""
    back_T: Tensor | None
    """int64; the inverse of `order_T`."""
    root_tokens: int
    root_cu_seqlens: Tensor
    """int32 [roots + 1]"""
    child_cu_seqlens: Tensor
    """int32 [children + 1]"""
    parents: Tensor
    """int64 [children]; which root each goes on from."""
    roots: Common
    """Lengths of the roots on the host, ..."""
    children: Common
    """... and of the children."""

    def gather(self, x_TC: Tensor) -> Tensor:
        """Tokens in the order of generations."""
        return x_TC if self.order_T is None else x_TC.index_select(0, self.order_T)

    def scatter(self, x_TC: Tensor) -> Tensor:
        """Undo `gather`."""
        return x_TC if self.back_T is None else x_TC.index_select(0, self.back_T)


def tree_of(cu_seqlens: Tensor, parents: Tensor, common: Common | None = None) -> Tree | None:
    """The generations of packed segments: cu_seqlens int32 [S + 1], parents int32 [S], -1 for a root.

    A parent is a root (`attention.shared_prefix` has the same rule); it may be any, before or after its
    children. None where all stand alone. Reads both tensors back from the device once where `common` does not
    hold them. Raises ValueError for a parent that has a parent itself.
    """
    known = Common() if common is None else common
    ends = known.cu_seqlens or [int(end) for end in cu_seqlens.tolist()]
    tree = known.parents or [int(parent) for parent in parents.tolist()]
    spans = list(pairwise(ends))
    roots = [segment for segment, parent in enumerate(tree) if parent < 0]
    children = [segment for segment, parent in enumerate(tree) if parent >= 0]
    if not children:
        return None
    place = {segment: index for index, segment in enumerate(roots)}
    for segment in children:
        if tree[segment] not in place:
            raise ValueError(f"parent {tree[segment]} of segment {segment} has a parent itself")
    device = cu_seqlens.device
    order, back = _order([spans[segment] for segment in (*roots, *children)], ends[-1])
    root_bounds = _bounds([spans[segment] for segment in roots])
    child_bounds = _bounds([spans[segment] for segment in children])
    return Tree(
        order_T=None if order is None else order.to(device),
        back_T=None if back is None else back.to(device),
        root_tokens=root_bounds[-1],
        root_cu_seqlens=torch.tensor(root_bounds, dtype=torch.int32, device=device),
        child_cu_seqlens=torch.tensor(child_bounds, dtype=torch.int32, device=device),
        parents=torch.tensor([place[tree[s]] for s in children], dtype=torch.int64, device=device),
        roots=Common(cu_seqlens=root_bounds),
        children=Common(cu_seqlens=child_bounds),
    )


def _bounds(spans: list[tuple[int, int]]) -> list[int]:
    bounds = [0]
    for start, end in spans:
        bounds.append(bounds[-1] + end - start)
    return bounds


def _order(spans: list[tuple[int, int]], tokens: int) -> tuple[Tensor | None, Tensor | None]:
    order_T = torch.cat([torch.arange(start, end) for start, end in spans] or [torch.arange(0)])
    identity_T = torch.arange(tokens)
    if torch.equal(order_T, identity_T):
        return None, None
    back_T = torch.empty_like(order_T)
    back_T[order_T] = identity_T
    return order_T, back_T
