"""Records of the rollout's routing in packed batches: every token has its own, and only that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.algo.packing import pack
from grpo_core.types import Batch, Completion, RoutedExperts, Sample, Scored

LAYERS, CHOSEN = 3, 2


def rows(group: int, index: int, count: int) -> torch.Tensor:
    """int16 [count, M, k]; every row tells group, completion and place."""
    numbers = torch.arange(count)[:, None, None] + 20 * index + 200 * group
    return (numbers + 1000 * torch.arange(LAYERS)[:, None] + 5000 * torch.arange(CHOSEN)).to(torch.int16)


def scored_group(group: int, prompt: int, lengths: list[int], recorded: list[bool]) -> list[Scored]:
    shared = rows(group, 9, prompt)
    found = []
    for index, (length, has) in enumerate(zip(lengths, recorded, strict=True)):
        own = rows(group, index, length)
        own[-1:] = -1
        completion = Completion(
            prompt_id=group, index=index, token_ids=tuple(range(10, 10 + length)), text="",
            logprobs=(0.0,) * length, logprobs_t1=(), finish_reason="stop", weight_version=0,
            routed_experts=RoutedExperts(prompt_PMk=shared, completion_NMk=own) if has else None,
        )  # fmt: skip
        found.append(
            Scored(
                sample=Sample(id=str(group)),
                prompt_token_ids=(1 + group, *range(2, 1 + prompt)),
                completion=completion,
                rewards={},
                reward=0.0,
            )
        )
    return found


def check(batch: Batch, items: list[Scored]) -> None:
    """The rows that predict each loss token are those of its completion (or of its prompt's end)."""
    assert batch.routed_experts_TMk is not None
    assert batch.routed_experts_TMk.dtype == torch.int16
    assert tuple(batch.routed_experts_TMk.shape) == (batch.tokens_T.shape[0], LAYERS, CHOSEN)
    given_LMk = batch.routed_experts_TMk[batch.predict_L]
    start = 0
    for item in items:
        length = len(item.completion.token_ids)
        records = item.completion.routed_experts
        if records is not None and length:
            wanted = torch.cat([records.prompt_PMk[-1:], records.completion_NMk[:-1]])
            assert torch.equal(given_LMk[start : start + length], wanted)
        start += length


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(0, 7), min_size=1, max_size=4)),
        min_size=1, max_size=4,
    ),
    share_prompt=st.booleans(),
)  # fmt: skip
def test_every_loss_token_has_the_record_of_the_token_before_it(
    groups: list[tuple[int, list[int]]], share_prompt: bool
) -> None:
    items = [
        item
        for group, (prompt, lengths) in enumerate(groups)
        for item in scored_group(group, prompt, lengths, [True] * len(lengths))
    ]
    [batch] = pack(items, micro_tokens=10_000, share_prompt=share_prompt, device="cpu")
    check(batch, items)
    assert bool((batch.routed_experts_TMk >= 0).all()), "every input was computed by the rollout"


@pytest.mark.parametrize("share_prompt", [True, False])
def test_a_completion_without_a_record_is_unknown_and_spoils_no_other(share_prompt: bool) -> None:
    items = scored_group(0, 3, [4, 5], [False, True]) + scored_group(1, 2, [3], [False])
    [batch] = pack(items, micro_tokens=1000, share_prompt=share_prompt, device="cpu")
    check(batch, items)
    unknown = (batch.routed_experts_TMk < 0).all(-1).all(-1)
    # The first completion's three inputs and the second group's four tokens; apart, also its own prompt.
    assert int(unknown.sum()) == 3 + 4 + (0 if share_prompt else 3)


def test_no_record_gives_none() -> None:
    items = scored_group(0, 3, [4, 5], [False, False])
    [batch] = pack(items, micro_tokens=1000, share_prompt=True, device="cpu")
    assert batch.routed_experts_TMk is None
    assert replace(batch).to("cpu").routed_experts_TMk is None


def test_a_group_cut_into_micro_batches_carries_its_prompts_record_in_each() -> None:
    items = scored_group(0, 4, [6, 6, 6], [True] * 3)
    batches = pack(items, micro_tokens=10, share_prompt=True, device="cpu")
    assert len(batches) == 3
    for batch in batches:
        assert torch.equal(batch.routed_experts_TMk[:4], items[0].completion.routed_experts.prompt_PMk)
