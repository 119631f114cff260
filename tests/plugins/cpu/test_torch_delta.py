"""Parts of the torch offer of `gated_delta.chunk`; its answers: core/ops/test_linear_attention_offers."""

from __future__ import annotations

import delta_checks as check
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo_cpu import delta
from grpo_cpu.delta_plan import plan_chunks
from grpo_cpu.triangular import Solve


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
