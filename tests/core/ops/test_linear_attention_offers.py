"""`gated_delta.*` and `short_conv.*`: reference, torch offers and C++ pack of the CPU, by the same checks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import delta_checks as check
import pytest
import torch
import transformer_mixers

from grpo_core.ops.reference import linear_attention as reference
from grpo_cpu import delta, short_conv
from grpo_cpu.native import compiler, cpu_flags

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NATIVE = pytest.mark.skipif(
    "avx512_bf16" not in cpu_flags() or compiler() is None,
    reason="the C++ pack needs AVX512-BF16 and a compiler",
)


class Offer(NamedTuple):
    chunk: Callable[..., Any]
    conv: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = DTYPES
    """The widest first."""
    step: Callable[..., Any] | None = None
    conv_step: Callable[..., Any] | None = None


def core_reference() -> Offer:
    return Offer(
        reference.delta_chunk, reference.conv_varlen, step=reference.delta_step, conv_step=reference.conv_step
    )


def cpu_torch() -> Offer:
    return Offer(delta.chunk, short_conv.varlen, step=delta.step, conv_step=short_conv.step)


def cpu_native() -> Offer:
    native = importlib.import_module("grpo_cpu.native_recurrent")
    return Offer(native.delta_chunk, native.conv_varlen, dtypes=DTYPES[1:])


STEPS = (core_reference, cpu_torch)
OFFERS = [*STEPS, pytest.param(cpu_native, marks=NATIVE)]
DTYPED = [
    *((make, dtype) for make in STEPS for dtype in DTYPES),
    *(pytest.param(cpu_native, dtype, marks=NATIVE) for dtype in DTYPES[1:]),
]
every = pytest.mark.parametrize("make", OFFERS)
dtyped = pytest.mark.parametrize("make, dtype", DTYPED)


@dtyped
@pytest.mark.parametrize("case", check.LENGTHS)
def test_chunks(make: Callable[[], Offer], case: str, dtype: torch.dtype) -> None:
    check.check_chunk(make().chunk, dtype, check.LENGTHS[case], decay=0.1)


@every
@pytest.mark.parametrize("decay", check.DECAYS.values(), ids=check.DECAYS)
@pytest.mark.parametrize("start", [True, False])
def test_every_decay(make: Callable[[], Offer], decay: float, start: bool) -> None:
    offer = make()
    for dtype in {offer.dtypes[0], torch.float32}:
        check.check_chunk(offer.chunk, dtype, [9, 100], decay=decay, start=start)


@every
def test_small_decays_after_strong_ones_were_lost_in_float32(make: Callable[[], Offer]) -> None:
    """exp(c_i - c_j) with c near -1280 in float32 was off by 1e-4 where both steps forget next to nothing."""
    T = 64
    q, k, v, _, beta, state = check.inputs(T, 1, torch.float32)
    g = torch.full((T, 4), -20.0)
    g[T // 2 :] = -0.01
    o, last = make().chunk(
        q, k, v, g, beta, cu_seqlens=check.cumulative([T]), scale=0.3, initial_state_SKDE=state,
        final_state=True,
    )  # fmt: skip
    wanted = check.delta_rule(q, k, v, g, beta, state, [T], 0.3)
    check.oracle.assert_close([o, last], wanted, torch.float32, factor=0.1)


@every
def test_a_key_that_repeats_and_is_overwritten_each_time(make: Callable[[], Offer]) -> None:
    """The hardest systems: every product of keys is 1 or -1, nothing decays, each step replaces all."""
    T = 130
    q, _, v, _, _, state = check.inputs(T, 1, torch.float32)
    sign = torch.where(torch.arange(T) % 3 == 0, -1.0, 1.0)
    k = check.normalize(torch.ones(T, 2, 8), dim=-1) * sign[:, None, None]
    g, beta = torch.zeros(T, 4), torch.ones(T, 4)
    o, last = make().chunk(
        q, k, v, g, beta, cu_seqlens=check.cumulative([T]), scale=0.3, initial_state_SKDE=state,
        final_state=True,
    )  # fmt: skip
    wanted = check.delta_rule(q, k, v, g, beta, state, [T], 0.3)
    check.oracle.assert_close([o, last], wanted, torch.float32)


@every
def test_a_key_head_for_each_value_head(make: Callable[[], Offer]) -> None:
    offer = make()
    check.check_chunk(offer.chunk, offer.dtypes[0], [9, 100], decay=0.1, H=4)


@every
def test_batches_without_tokens(make: Callable[[], Offer]) -> None:
    offer = make()
    check.check_no_tokens(offer.chunk, offer.conv)


@every
def test_without_last_states(make: Callable[[], Offer]) -> None:
    check.check_output_alone(make().chunk)


@pytest.mark.parametrize("make", STEPS)
def test_gradients_through_the_last_state_alone(make: Callable[[], Offer]) -> None:
    check.check_last_state_alone(make().chunk)


@pytest.mark.parametrize("make", STEPS)
def test_packed_sequences_equal_separate_ones(make: Callable[[], Offer]) -> None:
    check.check_packed_is_separate(make().chunk, [70, 12, 0, 5, 140])


@every
def test_heads_that_do_not_divide_are_refused(make: Callable[[], Offer]) -> None:
    offer = make()
    q, k, v, g, beta, state = check.inputs(4, 1, torch.float32, H=3)
    with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
        offer.chunk(
            q, k, v, g, beta, cu_seqlens=check.cumulative([4]), scale=1.0, initial_state_SKDE=None,
            final_state=False,
        )  # fmt: skip
    if offer.step is not None:
        one = (x[:1] for x in (q, k, v, g, beta))
        with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
            offer.step(*one, state_NKDE=state, slots=torch.tensor([0]), scale=1.0)


@every
def test_cumulative_lengths_must_cover_the_tokens(make: Callable[[], Offer]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        make().chunk(
            *check.inputs(4, 1, torch.float32)[:5], cu_seqlens=check.cumulative([3]), scale=1.0,
            initial_state_SKDE=None, final_state=False,
        )  # fmt: skip


@pytest.mark.parametrize("make", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("H", [2, 4])
def test_step(make: Callable[[], Offer], dtype: torch.dtype, B: int, H: int) -> None:
    check.check_step(make().step, dtype, B, H=H)


@dtyped
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 9, 2]], ids=str)
@pytest.mark.parametrize("start", [True, False])
def test_short_conv(make: Callable[[], Offer], dtype: torch.dtype, lengths: list[int], start: bool) -> None:
    check.check_conv(make().conv, dtype, lengths, start=start)


@every
@pytest.mark.parametrize("W", [1, 2, 5])
def test_short_conv_of_other_widths(make: Callable[[], Offer], W: int) -> None:
    offer = make()
    check.check_conv(offer.conv, offer.dtypes[0], [3, 7, 1], W=W)


@every
def test_short_conv_keeps_to_its_segment(make: Callable[[], Offer]) -> None:
    check.check_conv_keeps_to_its_segment(make().conv)


@pytest.mark.parametrize("make", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 4])
def test_short_conv_step(make: Callable[[], Offer], dtype: torch.dtype, W: int) -> None:
    check.check_conv_step(make().conv_step, dtype, W)


@every
@pytest.mark.parametrize("recurrent", [True, False])
def test_chunks_equal_transformers(make: Callable[[], Offer], recurrent: bool) -> None:
    transformer_mixers.check_delta(make().chunk, recurrent)


@pytest.mark.parametrize("make", STEPS)
def test_steps_equal_transformers(make: Callable[[], Offer]) -> None:
    transformer_mixers.check_delta_step(make().step)
