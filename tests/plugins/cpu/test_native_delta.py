"""gated_delta.chunk and short_conv.varlen of the C++ pack against the papers' formulas in float64."""

from __future__ import annotations

import importlib
from itertools import pairwise

import delta_checks as check
import pytest
import torch
import transformer_mixers
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_recurrent")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.LENGTHS)
def test_chunks(case: str, dtype: torch.dtype) -> None:
    check.check_chunk(native.delta_chunk, dtype, check.LENGTHS[case], decay=0.1)


@pytest.mark.parametrize("decay", check.DECAYS.values(), ids=check.DECAYS)
@pytest.mark.parametrize("start", [True, False])
def test_every_decay(decay: float, start: bool) -> None:
    check.check_chunk(native.delta_chunk, torch.float32, [9, 100], decay=decay, start=start)


def test_small_decays_after_strong_ones() -> None:
    T = 64
    q, k, v, _, beta, state = check.inputs(T, 1, torch.float32)
    g = torch.full((T, 4), -20.0)
    g[T // 2 :] = -0.01
    o, last = native.delta_chunk(
        q, k, v, g, beta, cu_seqlens=check.cumulative([T]), scale=0.3, initial_state_SKDE=state,
        final_state=True,
    )  # fmt: skip
    wanted = check.delta_rule(q, k, v, g, beta, state, [T], 0.3)
    check.oracle.assert_close([o, last], wanted, torch.float32, factor=0.1)


def test_a_key_that_repeats_and_is_overwritten_each_time() -> None:
    T = 130
    q, _, v, _, _, state = check.inputs(T, 1, torch.float32)
    sign = torch.where(torch.arange(T) % 3 == 0, -1.0, 1.0)
    k = check.normalize(torch.ones(T, 2, 8), dim=-1) * sign[:, None, None]
    g, beta = torch.zeros(T, 4), torch.ones(T, 4)
    o, last = native.delta_chunk(
        q, k, v, g, beta, cu_seqlens=check.cumulative([T]), scale=0.3, initial_state_SKDE=state,
        final_state=True,
    )  # fmt: skip
    wanted = check.delta_rule(q, k, v, g, beta, state, [T], 0.3)
    check.oracle.assert_close([o, last], wanted, torch.float32)


@pytest.mark.parametrize("D, E", [(64, 64), (40, 100), (128, 16)])
def test_other_widths(D: int, E: int) -> None:
    """Of several vectors, whole and cut."""
    lengths = [70, 3]
    given = check.inputs(73, 2, torch.float32, D=D, E=E)

    def run(impl: check.Chunk) -> list[torch.Tensor]:
        return check.oracle.with_grads(
            lambda *x: impl(
                *x[:5], cu_seqlens=check.cumulative(lengths), scale=0.3, initial_state_SKDE=x[5],
                final_state=True,
            ), given,
        )  # fmt: skip

    wanted = check.oracle.with_grads(
        lambda *x: check.delta_rule(*x, lengths, 0.3), [x.double() for x in given]
    )
    check.oracle.assert_close(run(native.delta_chunk), wanted, torch.float32)


def test_a_key_head_for_each_value_head() -> None:
    check.check_chunk(native.delta_chunk, torch.float32, [9, 100], decay=0.1, H=4)


def test_batches_without_tokens() -> None:
    check.check_no_tokens(native.delta_chunk, native.conv_varlen)


def test_without_last_states() -> None:
    check.check_output_alone(native.delta_chunk)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 150), min_size=1, max_size=4))
def test_packed_sequences_equal_separate_ones(lengths: list[int]) -> None:
    q, k, v, g, beta, _ = check.inputs(sum(lengths), len(lengths), torch.float32)
    ends = check.cumulative(lengths).tolist()
    settings = {"scale": 0.3, "initial_state_SKDE": None, "final_state": False}
    packed, _ = native.delta_chunk(q, k, v, g, beta, cu_seqlens=check.cumulative(lengths), **settings)
    for start, end in pairwise(ends):
        part = (x[start:end] for x in (q, k, v, g, beta))
        alone, _ = native.delta_chunk(*part, cu_seqlens=check.cumulative([end - start]), **settings)
        assert torch.equal(packed[start:end], alone)


def test_inputs_that_are_slices_of_one_projection() -> None:
    q, k, v, g, beta, _ = check.inputs(70, 1, torch.bfloat16, D=8, E=8)
    parts = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1).split([16, 16, 32], 1)
    settings = {
        "cu_seqlens": check.cumulative([70]), "scale": 1.0, "initial_state_SKDE": None, "final_state": False,
    }  # fmt: skip
    o, _ = native.delta_chunk(*(x.unflatten(1, (-1, 8)) for x in parts), g, beta, **settings)
    assert torch.equal(o, native.delta_chunk(q, k, v, g, beta, **settings)[0])


def test_threads_change_nothing() -> None:
    lengths = [70, 130, 5]
    given = check.inputs(205, 3, torch.float32)
    conv = torch.randn(205, 70), torch.randn(70, 4)
    common = {"cu_seqlens": check.cumulative(lengths), "final_state": True}

    def run() -> list[torch.Tensor]:
        chunks = check.oracle.with_grads(
            lambda *x: native.delta_chunk(*x[:5], scale=0.3, initial_state_SKDE=x[5], **common), given
        )
        return [
            *chunks,
            *check.oracle.with_grads(
                lambda *x: native.conv_varlen(*x, initial_state_SCW=None, **common), conv
            ),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_heads_that_do_not_divide_are_refused() -> None:
    given = check.inputs(4, 1, torch.float32, H=3)
    with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
        native.delta_chunk(
            *given[:5], cu_seqlens=check.cumulative([4]), scale=1.0, initial_state_SKDE=None,
            final_state=False,
        )  # fmt: skip


def test_cumulative_lengths_must_cover_the_tokens() -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        native.delta_chunk(
            *check.inputs(4, 1, torch.float32)[:5], cu_seqlens=check.cumulative([3]), scale=1.0,
            initial_state_SKDE=None, final_state=False,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 9, 2]], ids=str)
@pytest.mark.parametrize("start", [True, False])
def test_short_conv(dtype: torch.dtype, lengths: list[int], start: bool) -> None:
    check.check_conv(native.conv_varlen, dtype, lengths, start=start)


@pytest.mark.parametrize("W", [1, 2, 5])
def test_short_conv_of_other_widths(W: int) -> None:
    check.check_conv(native.conv_varlen, torch.float32, [3, 7, 1], W=W)


def test_short_conv_keeps_to_its_segment() -> None:
    check.check_conv_keeps_to_its_segment(native.conv_varlen)


@pytest.mark.parametrize("recurrent", [True, False])
def test_chunks_equal_transformers(recurrent: bool) -> None:
    transformer_mixers.check_delta(native.delta_chunk, recurrent)
