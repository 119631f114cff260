from __future__ import annotations

import delta_checks as check
import pytest
import torch
import transformer_mixers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_cpu import delta, short_conv
from grpo_cpu.delta_plan import plan_chunks
from grpo_cpu.triangular import Solve

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.LENGTHS)
def test_chunks(case: str, dtype: torch.dtype) -> None:
    check.check_chunk(delta.chunk, dtype, check.LENGTHS[case], decay=0.1)


@pytest.mark.parametrize("decay", check.DECAYS.values(), ids=check.DECAYS)
@pytest.mark.parametrize("start", [True, False])
def test_every_decay(decay: float, start: bool) -> None:
    check.check_chunk(delta.chunk, torch.float32, [9, 100], decay=decay, start=start)


def test_small_decays_after_strong_ones_were_lost_in_float32() -> None:
    """exp(c_i - c_j) with c near -1280 in float32 was off by 1e-4 where both steps forget next to nothing."""
    T = 64
    q, k, v, _, beta, state = check.inputs(T, 1, torch.float32)
    g = torch.full((T, 4), -20.0)
    g[T // 2 :] = -0.01
    o, last = delta.chunk(
        q, k, v, g, beta, cu_seqlens=check.cumulative([T]), scale=0.3, initial_state_SKDE=state,
        final_state=True,
    )  # fmt: skip
    wanted = check.delta_rule(q, k, v, g, beta, state, [T], 0.3)
    check.oracle.assert_close([o, last], wanted, torch.float32, factor=0.1)


def test_a_key_that_repeats_and_is_overwritten_each_time() -> None:
    """The hardest systems: every product of keys is 1 or -1, nothing decays, each step replaces all."""
    T = 130
    q, _, v, _, _, state = check.inputs(T, 1, torch.float32)
    sign = torch.where(torch.arange(T) % 3 == 0, -1.0, 1.0)
    k = check.normalize(torch.ones(T, 2, 8), dim=-1) * sign[:, None, None]
    g, beta = torch.zeros(T, 4), torch.ones(T, 4)
    o, last = delta.chunk(
        q, k, v, g, beta, cu_seqlens=check.cumulative([T]), scale=0.3, initial_state_SKDE=state,
        final_state=True,
    )  # fmt: skip
    wanted = check.delta_rule(q, k, v, g, beta, state, [T], 0.3)
    check.oracle.assert_close([o, last], wanted, torch.float32)


@pytest.mark.parametrize("C", [16, 32, 64, 128])
def test_triangular_systems(C: int) -> None:
    generator = torch.Generator().manual_seed(C)
    system = torch.randn(2, 3, C, C, generator=generator, dtype=torch.float64) / C**0.5
    system[..., 0, -1] = torch.nan  # nothing above the diagonal is read
    right = torch.randn(2, 3, C, 5, generator=generator, dtype=torch.float64)

    def solved(system: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(torch.nan_to_num(system), right, upper=False, unitriangular=True)

    leaves = [x.clone().requires_grad_() for x in (system, right)]
    again = [x.clone().requires_grad_() for x in (system, right)]
    weight = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    got, wanted = Solve.apply(*leaves), solved(*again)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad((got * weight).sum(), leaves)
    expected = torch.autograd.grad((wanted * weight).sum(), again)
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-11)


def test_a_key_head_for_each_value_head() -> None:
    check.check_chunk(delta.chunk, torch.float64, [9, 100], decay=0.1, H=4)


def test_batches_without_tokens() -> None:
    check.check_no_tokens(delta.chunk, short_conv.varlen)


def test_without_last_states() -> None:
    check.check_output_alone(delta.chunk)


def test_gradients_through_the_last_state_alone() -> None:
    check.check_last_state_alone(delta.chunk)


def test_packed_sequences_equal_separate_ones() -> None:
    check.check_packed_is_separate(delta.chunk, [70, 12, 0, 5, 140])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4))
def test_a_sequence_in_pieces_is_the_sequence(cuts: list[int]) -> None:
    check.check_split_anywhere(delta.chunk, cuts)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([16, 32]))
def test_every_token_has_one_place_in_its_own_chunk(lengths: list[int], most: int) -> None:
    ends = tuple(check.cumulative(lengths).tolist())
    plan = plan_chunks(ends, most)
    T = ends[-1]
    assert plan.tokens[plan.places].tolist() == list(range(T))
    assert plan.starts[-1] * plan.size == plan.tokens.numel()
    assert sorted(plan.tokens[plan.tokens < T].tolist()) == list(range(T))
    assert plan.order[plan.ranks].tolist() == list(range(len(lengths)))
    for at, members in enumerate(plan.rounds):
        for rank in range(members):
            first = (plan.starts[at] + rank) * plan.size
            inside = plan.tokens[first : first + plan.size]
            segment = plan.order[rank]
            real = inside[inside < T]
            start = ends[segment] + at * plan.size
            assert real.tolist() == list(range(start, min(start + plan.size, ends[segment + 1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("H", [2, 4])
def test_step(dtype: torch.dtype, B: int, H: int) -> None:
    check.check_step(delta.step, dtype, B, H=H)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v, g, beta, state = check.inputs(4, 1, torch.float32, H=3)
    with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
        delta.chunk(
            q, k, v, g, beta, cu_seqlens=check.cumulative([4]), scale=1.0, initial_state_SKDE=None,
            final_state=False,
        )  # fmt: skip
    with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
        delta.step(q[:1], k[:1], v[:1], g[:1], beta[:1], state_NKDE=state, slots=torch.tensor([0]), scale=1.0)


def test_cumulative_lengths_must_cover_the_tokens() -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        delta.chunk(
            *check.inputs(4, 1, torch.float32)[:5], cu_seqlens=check.cumulative([3]), scale=1.0,
            initial_state_SKDE=None, final_state=False,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 9, 2]], ids=str)
@pytest.mark.parametrize("start", [True, False])
def test_short_conv(dtype: torch.dtype, lengths: list[int], start: bool) -> None:
    check.check_conv(short_conv.varlen, dtype, lengths, start=start)


@pytest.mark.parametrize("W", [1, 2, 5])
def test_short_conv_of_other_widths(W: int) -> None:
    check.check_conv(short_conv.varlen, torch.float64, [3, 7, 1], W=W)


def test_short_conv_keeps_to_its_segment() -> None:
    check.check_conv_keeps_to_its_segment(short_conv.varlen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 4])
def test_short_conv_step(dtype: torch.dtype, W: int) -> None:
    check.check_conv_step(short_conv.step, dtype, W)


@pytest.mark.parametrize("recurrent", [True, False])
def test_chunks_equal_transformers(recurrent: bool) -> None:
    transformer_mixers.check_delta(delta.chunk, recurrent)


def test_steps_equal_transformers() -> None:
    transformer_mixers.check_delta_step(delta.step)
