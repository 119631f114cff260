"""Scored completions as packed micro-batches: no padding, a group's prompt once."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..types import Batch, RoutedExperts, Scored

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Completions that go into one micro-batch together, with the prompt that they share."""

    members: tuple[int, ...]
    """Indices into the scored completions."""
    cost: int
    """Packed tokens."""


def pack(
    scored: Sequence[Scored], *, micro_tokens: int, share_prompt: bool, device: torch.device | str
) -> list[Batch]:
    """Cut the completions of one mini-batch into micro-batches of at most `micro_tokens` packed tokens.

    With `share_prompt` the completions of a group stay together and their prompt is one segment that they
    attend; a group larger than the budget is split and its prompt repeated. Otherwise every completion is
    one segment with its own prompt. A completion larger than the budget gets a micro-batch of its own.
    A completion's last token predicts nothing, so it is a label but not an input; a completion of no
    tokens has its place in N and nothing else. Loads are evened out, the result depends on the order of
    `scored` alone, and the heaviest micro-batch comes first: memory that does not suffice shows at once.
    Raises ValueError for an empty prompt, which leaves the first token without a predictor.
    """
    for item in scored:
        if not item.prompt_token_ids:
            raise ValueError(f"sample {item.sample.id!r} has a prompt of no tokens")
    units = _units(scored, micro_tokens, share_prompt)
    bins = [
        ([member for unit in chosen for member in units[unit].members], sum(units[u].cost for u in chosen))
        for chosen in balance([unit.cost for unit in units], micro_tokens)
    ]
    bins.sort(key=lambda members_cost: -members_cost[1])
    return [_batch([scored[m] for m in sorted(members)], share_prompt).to(device) for members, _ in bins]


def split_mini_batches(scored: Sequence[Scored], count: int, *, seed: int) -> list[list[Scored]]:
    """Exactly `count` parts of whole groups, their sizes as even as groups allow.

    Groups are shuffled by `seed` when there is more than one part; a part is empty when there are fewer
    groups than parts (a data-parallel rank then waits for the others in that optimizer step).
    """
    if count == 1:
        return [list(scored)]
    groups = list(_groups(scored).values())
    random.Random(seed).shuffle(groups)
    return [[scored[member] for group in groups[part::count] for member in group] for part in range(count)]


def balance(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices into `costs` in the fewest bins found with each sum within `budget`, sums evened out.

    The largest item goes first, each into the lightest bin (Graham 1969, LPT), with more bins until all
    are within the budget; an item above the budget is alone. Deterministic; no bin is empty.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    total = sum(costs)
    if order and total <= budget:
        return [order]
    count = max(1, -(-total // max(budget, 1)))
    while order:
        heap = [(0, 0, b) for b in range(min(count, len(costs)))]
        bins: list[list[int]] = [[] for _ in heap]
        for index in order:
            load, size, lightest = heapq.heappop(heap)
            bins[lightest].append(index)
            heapq.heappush(heap, (load + costs[index], size + 1, lightest))
        if all(load <= budget or size == 1 for load, size, _ in heap):
            return [chosen for chosen in bins if chosen]
        count += 1
    return []


def _groups(scored: Sequence[Scored]) -> dict[tuple[int, tuple[int, ...]], list[int]]:
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, item in enumerate(scored):
        groups.setdefault((item.completion.prompt_id, item.prompt_token_ids), []).append(index)
    return groups


def _inputs(item: Scored) -> int:
    return max(len(item.completion.token_ids) - 1, 0)


def _units(scored: Sequence[Scored], micro_tokens: int, share_prompt: bool) -> list[_Unit]:
    if not share_prompt:
        return [
            _Unit(members=(index,), cost=len(item.prompt_token_ids) + _inputs(item))
            for index, item in enumerate(scored)
        ]
    units: list[_Unit] = []
    for (_, prompt), members in _groups(scored).items():
        costs = [_inputs(scored[member]) for member in members]
        for part in balance(costs, micro_tokens - len(prompt)):
            units.append(
                _Unit(
                    members=tuple(members[i] for i in part),
                    cost=len(prompt) + sum(costs[i] for i in part),
                )
            )
    return units


@dataclass(slots=True)
class _Rows:
    """What becomes a batch's tensors: segments, then where each completion is predicted from."""

    segments: list[Sequence[int]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of each segment's first token."""
    parents: list[int] = field(default_factory=list)
    tokens: int = 0
    before: list[int] = field(default_factory=list)
    """The token that predicts each completion's first, ..."""
    after: list[int] = field(default_factory=list)
    """... and the one that predicts its second."""
    experts: list[tuple[int, Tensor]] = field(default_factory=list)
    """Records of the rollout, each from a token of T on."""

    def segment(self, token_ids: Sequence[int], *, position: int, parent: int) -> int:
        """Append a segment; returns the index of its first token in T."""
        first = self.tokens
        self.segments.append(token_ids)
        self.positions.append(position)
        self.parents.append(parent)
        self.tokens += len(token_ids)
        return first

    def routed(self, records: RoutedExperts | None, *, prompt: int, completion: int) -> None:
        """Note what was recorded of a prompt and a completion, whose inputs start at these tokens of T; a
        completion's last token is not an input."""
        if records is not None:
            self.experts += [(prompt, records.prompt_PMk), (completion, records.completion_NMk[:-1])]

    def loss_tokens(self, *, before: int, after: int) -> None:
        """The next completion's labels: `before` predicts the first, `after` onwards the others."""
        self.before.append(before)
        self.after.append(after)


def _batch(items: Sequence[Scored], share_prompt: bool) -> Batch:
    import torch

    rows = _Rows()
    if share_prompt:
        _share(rows, items)
    else:
        _alone(rows, items)
    sizes_S = np.array([len(segment) for segment in rows.segments], dtype=np.int64)
    bounds = np.concatenate([[0], sizes_S.cumsum()])
    lengths_N = np.array([len(item.completion.token_ids) for item in items], dtype=np.int64)
    # Place of each loss token in its completion: where it is 0, the prompt's last token predicts.
    place_L = _places(lengths_N)
    predict_L = np.repeat(np.array(rows.after) - 1, lengths_N) + place_L
    predict_L[place_L == 0] = np.array(rows.before)[lengths_N > 0]
    loss_tokens = int(lengths_N.sum())
    return Batch(
        tokens_T=torch.from_numpy(_flat(rows.segments, rows.tokens, np.int64)),
        positions_T=torch.from_numpy(np.repeat(np.array(rows.positions), sizes_S) + _places(sizes_S)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        parents_S=torch.tensor(rows.parents, dtype=torch.int32),
        max_seqlen=int(sizes_S.max()),
        predict_L=torch.from_numpy(predict_L),
        labels_L=torch.from_numpy(_flat((i.completion.token_ids for i in items), loss_tokens, np.int64)),
        completion_L=torch.from_numpy(np.repeat(np.arange(len(items)), lengths_N)),
        lengths_N=torch.from_numpy(lengths_N),
        advantages_N=torch.tensor([item.advantage for item in items], dtype=torch.float32),
        rollout_logprobs_L=torch.from_numpy(
            _flat((i.completion.logprobs for i in items), loss_tokens, np.float32)
        ),
        routed_experts_TMk=_experts(rows),
        host_cu_seqlens=bounds.tolist(),
        host_parents=rows.parents,
    )


def _flat(parts: Iterable[Sequence[float]], count: int, dtype: type[Any]) -> NDArray[Any]:
    """The `count` numbers of all parts, one after the other."""
    return np.fromiter(chain.from_iterable(parts), dtype, count)


def _places(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... within each part of these sizes."""
    return np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)


def _experts(rows: _Rows) -> Tensor | None:
    """The records in their places, int16 [T, M, k], -1 where there is none."""
    import torch

    if not rows.experts:
        return None
    sizes = rows.experts[0][1].shape[1:]
    routed_TMk = torch.full((rows.tokens, *sizes), -1, dtype=torch.int16)
    for start, part_TMk in rows.experts:
        routed_TMk[start : start + part_TMk.shape[0]] = part_TMk
    return routed_TMk


def _share(rows: _Rows, items: Sequence[Scored]) -> None:
    """Each group as its prompt's segment and one of each completion; N stays in the order of `items`."""
    where: dict[int, tuple[int, int]] = {}
    for members in _groups(items).values():
        prompt = items[members[0]].prompt_token_ids
        parent = len(rows.parents)
        first = rows.segment(prompt, position=0, parent=-1)
        before = first + len(prompt) - 1
        for member in members:
            inputs = items[member].completion.token_ids[:-1]
            after = before + 1
            if inputs:
                after = rows.segment(inputs, position=len(prompt), parent=parent)
            rows.routed(items[member].completion.routed_experts, prompt=first, completion=after)
            where[member] = (before, after)
    for number in range(len(items)):
        before, after = where[number]
        rows.loss_tokens(before=before, after=after)


def _alone(rows: _Rows, items: Sequence[Scored]) -> None:
    """Each completion with its own prompt as one segment."""
    for item in items:
        prompt = item.prompt_token_ids
        first = rows.segment((*prompt, *item.completion.token_ids[:-1]), position=0, parent=-1)
        after = first + len(prompt)
        rows.routed(item.completion.routed_experts, prompt=first, completion=after)
        rows.loss_tokens(before=after - 1, after=after)
