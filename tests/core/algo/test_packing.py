"""Packed micro-batches: nothing lost, nothing twice, every index right."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.algo.packing import balance, pack, split_mini_batches
from grpo_core.types import Batch, Completion, Sample, Scored

Row = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Group, index, prompt, completion."""


@st.composite
def scored_lists(draw: st.DrawFn, smallest: int = 1) -> list[Scored]:
    """Groups of completions of 0 to 9 tokens, shuffled; every completion has its own advantage."""
    items: list[Scored] = []
    for group in range(draw(st.integers(smallest, 5))):
        prompt = tuple(draw(st.lists(st.integers(0, 99), min_size=1, max_size=8)))
        for index in range(draw(st.integers(1, 5))):
            ids = tuple(draw(st.lists(st.integers(0, 99), max_size=9)))
            items.append(scored_of(group, index, prompt, ids, advantage=float(len(items))))
    return draw(st.permutations(items))


def scored_of(
    group: int, index: int, prompt: tuple[int, ...], ids: tuple[int, ...], advantage: float = 0.0
) -> Scored:
    completion = Completion(
        prompt_id=group, index=index, token_ids=ids, text="", finish_reason="stop", weight_version=0,
        logprobs=tuple(-float(position) for position in range(len(ids))), logprobs_t1=(),
    )  # fmt: skip
    return Scored(
        sample=Sample(id=str(group)), prompt_token_ids=prompt, completion=completion, rewards={}, reward=0.0,
        advantage=advantage,
    )  # fmt: skip


def context(batch: Batch, index: int) -> tuple[int, ...]:
    """All tokens that the hidden state at `index` of T has seen, by segments and parents."""
    bounds = batch.cu_seqlens.tolist()
    segment = next(s for s in range(len(bounds) - 1) if bounds[s] <= index < bounds[s + 1])
    tokens = batch.tokens_T.tolist()
    parent = int(batch.parents_S[segment])
    before = tokens[bounds[parent] : bounds[parent + 1]] if parent >= 0 else []
    return (*before, *tokens[bounds[segment] : index + 1])


def check_shape(batch: Batch) -> None:
    """Segments cover T, parents come first and have no parent, positions go on from the parent."""
    bounds, parents = batch.cu_seqlens.tolist(), batch.parents_S.tolist()
    assert bounds[0] == 0 and bounds[-1] == batch.tokens_T.shape[0] and len(parents) == len(bounds) - 1
    lengths = [end - start for start, end in pairwise(bounds)]
    assert min(lengths) > 0 and max(lengths) == batch.max_seqlen
    for segment, parent in enumerate(parents):
        assert parent == -1 or (0 <= parent < segment and parents[parent] == -1)
        first = 0 if parent == -1 else lengths[parent]
        positions = batch.positions_T[bounds[segment] : bounds[segment + 1]].tolist()
        assert positions == list(range(first, first + lengths[segment]))
    assert batch.cu_seqlens.dtype == batch.parents_S.dtype == torch.int32
    assert batch.tokens_T.dtype == batch.predict_L.dtype == batch.labels_L.dtype == torch.int64


@given(scored_lists(), st.integers(1, 60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_loss_token_is_there_once_and_predicted_from_its_own_past(
    scored: list[Scored], micro_tokens: int, share: bool
) -> None:
    batches = pack(scored, micro_tokens=micro_tokens, share_prompt=share, device="cpu")
    wanted: Counter[object] = Counter()
    for item in scored:
        ids = item.completion.token_ids
        for place, token in enumerate(ids):
            past = (*item.prompt_token_ids, *ids[:place])
            wanted[(item.advantage, place, past, token, -float(place))] += 1
    found: Counter[object] = Counter()
    for batch in batches:
        check_shape(batch)
        seen: Counter[int] = Counter()
        for predict, label, owner, logprob in zip(
            *(
                x.tolist()
                for x in (batch.predict_L, batch.labels_L, batch.completion_L, batch.rollout_logprobs_L)
            ),
            strict=True,
        ):
            advantage = float(batch.advantages_N[owner])
            found[(advantage, seen[owner], context(batch, predict), label, logprob)] += 1
            seen[owner] += 1
        assert [seen[n] for n in range(len(batch.lengths_N))] == batch.lengths_N.tolist()
        assert batch.completion_L.tolist() == sorted(batch.completion_L.tolist())
    assert found == wanted
    owners = sorted(float(a) for batch in batches for a in batch.advantages_N)
    assert owners == sorted(item.advantage for item in scored)


@given(scored_lists(), st.integers(1, 60), st.booleans())
@settings(max_examples=100, deadline=None)
def test_budget_holds_but_for_a_completion_that_is_larger_alone(
    scored: list[Scored], micro_tokens: int, share: bool
) -> None:
    for batch in pack(scored, micro_tokens=micro_tokens, share_prompt=share, device="cpu"):
        assert batch.tokens_T.shape[0] <= micro_tokens or batch.lengths_N.shape[0] == 1


@given(scored_lists())
@settings(max_examples=50, deadline=None)
def test_a_group_that_fits_stays_together_and_pays_for_its_prompt_once(scored: list[Scored]) -> None:
    groups: dict[int, list[Scored]] = {}
    for item in scored:
        groups.setdefault(item.completion.prompt_id, []).append(item)
    costs = {
        group: len(items[0].prompt_token_ids) + sum(max(len(i.completion.token_ids) - 1, 0) for i in items)
        for group, items in groups.items()
    }
    batches = pack(scored, micro_tokens=max(costs.values()), share_prompt=True, device="cpu")
    assert sum(batch.tokens_T.shape[0] for batch in batches) == sum(costs.values())
    whole = pack(scored, micro_tokens=10_000, share_prompt=True, device="cpu")
    assert len(whole) == 1 and int((whole[0].parents_S == -1).sum()) == len(groups)


def test_equal_prompts_of_different_groups_are_shared_by_prompt_id_only() -> None:
    items = [scored_of(0, 0, (1, 2), (3, 4)), scored_of(1, 0, (1, 2), (5, 6))]
    [batch] = pack(items, micro_tokens=100, share_prompt=True, device="cpu")
    assert batch.parents_S.tolist() == [-1, 0, -1, 2]


@given(scored_lists(), st.integers(1, 60), st.booleans())
@settings(max_examples=30, deadline=None)
def test_packing_is_deterministic(scored: list[Scored], micro_tokens: int, share: bool) -> None:
    first = pack(scored, micro_tokens=micro_tokens, share_prompt=share, device="cpu")
    again = pack(scored, micro_tokens=micro_tokens, share_prompt=share, device="cpu")
    assert len(first) == len(again)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.predict_L, b.predict_L)


def test_nothing_packs_to_nothing_and_an_empty_prompt_is_refused() -> None:
    assert pack([], micro_tokens=5, share_prompt=True, device="cpu") == []
    with pytest.raises(ValueError, match="prompt of no tokens"):
        pack([scored_of(0, 0, (), (1,))], micro_tokens=5, share_prompt=True, device="cpu")


def test_completions_of_one_or_no_token_under_a_budget_below_their_prompt() -> None:
    """Their inputs cost nothing, which once put all of them into one bin for ever."""
    items = [scored_of(0, i, (1, 2, 3), (4,) * (i % 2)) for i in range(4)]
    batches = pack(items, micro_tokens=2, share_prompt=True, device="cpu")
    assert [batch.lengths_N.tolist() for batch in batches] == [[0], [1], [0], [1]]


@given(st.lists(st.integers(0, 50), max_size=30), st.integers(-5, 80))
@settings(max_examples=150, deadline=None)
def test_balance_puts_every_item_into_one_bin_within_the_budget(costs: list[int], budget: int) -> None:
    bins = balance(costs, budget)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(costs)))
    assert all(chosen for chosen in bins)
    for chosen in bins:
        assert sum(costs[i] for i in chosen) <= budget or len(chosen) == 1


def test_balance_evens_out() -> None:
    loads = sorted(sum(4 + i for i in chosen) for chosen in balance([4 + i for i in range(12)], 60))
    assert len(loads) == 2 and loads[1] - loads[0] <= 4


@given(scored_lists(), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_mini_batches_hold_whole_groups_once(scored: list[Scored], count: int, seed: int) -> None:
    parts = split_mini_batches(scored, count, seed=seed)
    assert len(parts) == count
    assert Counter(item.advantage for part in parts for item in part) == Counter(i.advantage for i in scored)
    homes: dict[int, set[int]] = {}
    for number, part in enumerate(parts):
        for item in part:
            homes.setdefault(item.completion.prompt_id, set()).add(number)
    assert all(len(home) == 1 for home in homes.values())
    groups = [len({item.completion.prompt_id for item in part}) for part in parts]
    assert max(groups) - min(groups) <= 1
    assert parts == split_mini_batches(scored, count, seed=seed)


def test_another_seed_is_another_split_and_one_part_keeps_the_order() -> None:
    scored = [scored_of(group, 0, (1,), (2,)) for group in range(20)]
    assert split_mini_batches(scored, 2, seed=0) != split_mini_batches(scored, 2, seed=1)
    assert split_mini_batches(scored, 1, seed=0) == [scored]


def test_to_moves_every_tensor() -> None:
    [batch] = pack([scored_of(0, 0, (1,), (2, 3))], micro_tokens=9, share_prompt=True, device="meta")
    fields = [getattr(batch, name) for name in batch.__slots__]
    assert all(field.is_meta for field in fields if isinstance(field, torch.Tensor))
    assert batch.max_seqlen == 1 and batch.old_logprobs_L is None
