from __future__ import annotations

import delta_checks as check
import pytest
import torch
import transformer_mixers

from grpo_core.ops.reference.linear_attention import conv_step, conv_varlen, delta_chunk, delta_step

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.LENGTHS)
def test_delta_chunk(case: str, dtype: torch.dtype) -> None:
    check.check_chunk(delta_chunk, dtype, check.LENGTHS[case], decay=0.1)


@pytest.mark.parametrize("decay", check.DECAYS.values(), ids=check.DECAYS)
def test_delta_chunk_with_every_decay_from_zero_states(decay: float) -> None:
    check.check_chunk(delta_chunk, torch.float64, [9, 20], decay=decay, start=False)


def test_delta_chunk_with_a_key_head_for_each_value_head() -> None:
    check.check_chunk(delta_chunk, torch.float64, [9, 20], decay=0.1, H=4)


def test_batches_without_tokens() -> None:
    check.check_no_tokens(delta_chunk, conv_varlen)


def test_delta_chunk_without_last_states() -> None:
    check.check_output_alone(delta_chunk)


def test_gradients_through_the_last_state_alone() -> None:
    check.check_last_state_alone(delta_chunk)


def test_packed_sequences_equal_separate_ones() -> None:
    check.check_packed_is_separate(delta_chunk, [7, 12, 0, 5])


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v, g, beta, _ = check.inputs(4, 1, torch.float32, H=3)
    with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
        delta_chunk(
            q, k, v, g, beta, cu_seqlens=check.cumulative([4]), scale=1.0, initial_state_SKDE=None,
            final_state=False,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [1, 5])
def test_delta_step(dtype: torch.dtype, B: int) -> None:
    check.check_step(delta_step, dtype, B)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1], [3, 0, 1, 9, 2]], ids=str)
@pytest.mark.parametrize("start", [True, False])
def test_short_conv(dtype: torch.dtype, lengths: list[int], start: bool) -> None:
    check.check_conv(conv_varlen, dtype, lengths, start=start)


@pytest.mark.parametrize("W", [1, 2, 5])
def test_short_conv_of_other_widths(W: int) -> None:
    check.check_conv(conv_varlen, torch.float64, [3, 7, 1], W=W)


def test_short_conv_keeps_to_its_segment() -> None:
    check.check_conv_keeps_to_its_segment(conv_varlen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 4])
def test_short_conv_step(dtype: torch.dtype, W: int) -> None:
    check.check_conv_step(conv_step, dtype, W)


@pytest.mark.parametrize("recurrent", [True, False])
def test_chunks_equal_transformers(recurrent: bool) -> None:
    transformer_mixers.check_delta(delta_chunk, recurrent)


def test_steps_equal_transformers() -> None:
    transformer_mixers.check_delta_step(delta_step)
