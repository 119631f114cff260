"""Sequence lengths on the host, where Ascend's attention wants them: a list of ints without the leading 0.

A caller that packed the batch knows them and says so (`Common`); otherwise they are fetched from the device,
once and not once a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds, parent_list

T = TypeVar("T")


class Remembered:
    """Results by the tensors that they were computed from, as long as the first of these lives unchanged.

    Tensors of inference mode carry no version, so that nothing could be told of their change: they are
    computed with anew.
    """

    def __init__(self) -> None:
        self._kept: Any = WeakIdKeyDictionary()

    def get(self, tensors: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` gives, or gave for the same tensors."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        key = tuple((id(tensor), tensor._version) for tensor in tensors)
        kept = self._kept.get(tensors[0])
        # The tensors after the first are kept alive with the result, so that their ids stay theirs.
        if kept is None or kept[0] != key:
            kept = (key, make(), tuple(tensors[1:]))
            self._kept[tensors[0]] = kept
        value: T = kept[1]
        return value


_ENDS, _PLANS = Remembered(), Remembered()


def ends_of(cu_seqlens: Tensor, tokens: int, common: Common | None = None) -> list[int]:
    """Ends of the sequences, the leading 0 included. Raises ValueError when they do not cover the tokens."""
    if common is not None and common.cu_seqlens is not None:
        return bounds(cu_seqlens, tokens, common)
    ends = _ENDS.get((cu_seqlens,), lambda: bounds(cu_seqlens, tokens))
    return ends if ends[-1] == tokens else bounds(cu_seqlens, tokens)


class KeyPlan:
    """Where the keys of each segment lie when it also sees its parent: [parent | own] side by side."""

    __slots__ = ("ends_k", "ends_q", "rows")

    def __init__(
        self, cu_seqlens: Tensor, parents: Tensor | None, tokens: int, common: Common | None = None
    ) -> None:
        self.ends_q = ends_of(cu_seqlens, tokens, common)
        self.ends_k = self.ends_q
        self.rows: Tensor | None = None
        """int64 row of each key; None where every segment stands alone."""
        count = len(self.ends_q) - 1
        tree = [-1] * count if parents is None else parent_list(parents, count, common)
        if any(parent >= 0 for parent in tree):
            self._gather(tree, cu_seqlens)

    def _gather(self, tree: list[int], like: Tensor) -> None:
        rows: list[int] = []
        ends = [0]
        for segment, parent in enumerate(tree):
            for part in (parent, segment) if parent >= 0 else (segment,):
                rows.extend(range(self.ends_q[part], self.ends_q[part + 1]))
            ends.append(len(rows))
        self.ends_k = ends
        self.rows = torch.tensor(rows, dtype=torch.int64).to(like.device)


def key_plan(
    cu_seqlens: Tensor, parents: Tensor | None, tokens: int, common: Common | None = None
) -> KeyPlan:
    """The plan of these segments. Raises ValueError as `bounds` and `parent_list` do."""
    if common is not None and common.cu_seqlens is not None:
        made: KeyPlan = common.once(
            ("ascend.keys", parents is None), lambda: KeyPlan(cu_seqlens, parents, tokens, common)
        )
        return made
    tensors = (cu_seqlens,) if parents is None else (cu_seqlens, parents)
    plan = _PLANS.get(tensors, lambda: KeyPlan(cu_seqlens, parents, tokens))
    return plan if plan.ends_q[-1] == tokens else KeyPlan(cu_seqlens, parents, tokens)
