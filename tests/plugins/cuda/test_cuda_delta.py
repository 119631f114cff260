"""The gated delta rule and the short convolution of the CUDA plugin: in torch, and vendors' by formula."""

from __future__ import annotations

from types import SimpleNamespace

import delta_checks as check
import expert_formulas as vendor
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.ops.common import Common
from grpo_cuda import delta, delta_conv
from grpo_cuda.delta_plan import place, plan_chunks

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def fused() -> SimpleNamespace:
    return vendor.adapters("fla", "fla_conv", "fla_conv1d")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", check.DECAYS)
@pytest.mark.parametrize("case", check.LENGTHS)
def test_chunk(case: str, decay: str, dtype: torch.dtype) -> None:
    for start in (True, False):
        check.check_chunk(delta.chunk, dtype, check.LENGTHS[case], decay=check.DECAYS[decay], start=start)


@pytest.mark.parametrize("heads", [1, 4])
def test_key_heads(heads: int) -> None:
    check.check_chunk(delta.chunk, torch.float64, [5, 70], decay=0.1, H=heads)


def test_chunk_alone_and_apart() -> None:
    check.check_no_tokens(delta.chunk, delta_conv.varlen)
    check.check_output_alone(delta.chunk)
    check.check_last_state_alone(delta.chunk)
    check.check_packed_is_separate(delta.chunk, [70, 3, 65])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4))
def test_a_sequence_in_pieces_is_the_sequence(cuts: list[int]) -> None:
    check.check_split_anywhere(delta.chunk, cuts)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([16, 32]))
def test_every_token_has_one_place_in_its_own_chunk(lengths: list[int], size: int) -> None:
    ends = check.cumulative(lengths).tolist()
    plan = plan_chunks(ends, torch.device("cpu"), size)
    T = ends[-1]
    assert plan.tokens[plan.places].tolist() == list(range(T))
    assert sorted(plan.tokens[plan.tokens < T].tolist()) == list(range(T))
    assert plan.order[plan.ranks].tolist() == list(range(len(lengths)))
    for at, members in enumerate(plan.rounds):
        for rank in range(members):
            first = (plan.starts[at] + rank) * size
            inside = plan.tokens[first : first + size]
            segment = int(plan.order[rank])
            start = ends[segment] + at * size
            assert inside[inside < T].tolist() == list(range(start, min(start + size, ends[segment + 1])))
    x = torch.arange(1.0, T + 1, requires_grad=True)
    placed = place(x, plan.tokens, plan.places)
    placed.sum().backward()
    assert x.grad is None if T == 0 and x.grad is None else x.grad.eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_step(batch: int, dtype: torch.dtype) -> None:
    for heads in (1, 2, 4):
        check.check_step(delta.step, dtype, batch, H=heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.LENGTHS)
@pytest.mark.parametrize("W", [1, 2, 4])
def test_conv(W: int, case: str, dtype: torch.dtype) -> None:
    for start in (True, False):
        check.check_conv(delta_conv.varlen, dtype, check.LENGTHS[case], W=W, start=start)


def test_conv_keeps_to_its_segment_and_steps() -> None:
    check.check_conv_keeps_to_its_segment(delta_conv.varlen)
    for dtype in DTYPES:
        for W in (1, 2, 4):
            check.check_conv_step(delta_conv.step, dtype, W)


@pytest.mark.parametrize("case", check.LENGTHS)
def test_flash_linear_attention(fused: SimpleNamespace, case: str) -> None:
    """Its carried states are float32 whatever the tokens are."""
    lengths = check.LENGTHS[case]
    for start in (True, False):
        check.check_chunk(fused.fla.chunk, torch.float32, lengths, decay=0.1, start=start)
        for W in (2, 4):
            check.check_conv(fused.fla_conv.varlen, torch.float32, lengths, W=W, start=start)


def test_flash_linear_attention_at_the_edges(fused: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    check.check_no_tokens(fused.fla.chunk, fused.fla_conv.varlen)
    check.check_output_alone(fused.fla.chunk)
    for heads in (1, 4):
        check.check_step(fused.fla.step, torch.float32, 5, H=heads)
    check.check_step(fused.fla.step, torch.bfloat16, 0)
    monkeypatch.setitem(vendor.STRICT, "dtype", True)
    check.check_chunk(fused.fla.chunk, torch.bfloat16, [5, 0, 70], decay=0.1)


def test_causal_conv1d(fused: SimpleNamespace) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for W in (2, 3, 4):
            check.check_conv_step(fused.fla_conv1d.step, dtype, W)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert fused.fla_conv1d.step(torch.zeros(0, 5), torch.ones(5, 4), state_NCW=torch.zeros(2, 5, 3),
                                 slots=nothing).shape == (0, 5)  # fmt: skip


def test_later_layers_read_no_lengths_from_the_device(fused: SimpleNamespace) -> None:
    """Their cu_seqlens could say anything."""
    lengths = [5, 0, 70]
    given = check.inputs(75, 3, torch.float32)
    x, w, state = given[2].flatten(1), torch.ones(24, 4), torch.rand(3, 24, 3)
    ends = check.cumulative(lengths)
    for chunk, conv in ((delta.chunk, delta_conv.varlen), (fused.fla.chunk, fused.fla_conv.varlen)):
        common = Common(cu_seqlens=ends.tolist())
        answers = [
            (
                *chunk(*given[:5], cu_seqlens=cu_seqlens, scale=0.3, initial_state_SKDE=given[5],
                       final_state=True, common=told),
                *conv(x, w, cu_seqlens=cu_seqlens, initial_state_SCW=state, final_state=True, common=told),
            )
            for cu_seqlens, told in ((ends, None), (ends, common), (torch.zeros_like(ends), common))
        ]  # fmt: skip
        for answer in answers[1:]:
            assert all(torch.equal(a, b) for a, b in zip(answer, answers[0], strict=True))
