"""gated_delta.step and short_conv.step of the C++ pack against the papers' formulas in float64."""

from __future__ import annotations

import importlib

import delta_checks as check
import pytest
import torch
import transformer_mixers

from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_recurrent")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, H", [(1, 2), (5, 4)])
@pytest.mark.parametrize("D, E", [(8, 6), (16, 16), (10, 50), (128, 144), (24, 304)])
def test_delta_step(dtype: torch.dtype, B: int, H: int, D: int, E: int) -> None:
    check.check_step(native.delta_step, dtype, B, H=H, D=D, E=E)


def test_delta_step_equals_transformers() -> None:
    transformer_mixers.check_delta_step(native.delta_step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("W", [1, 2, 4, 7])
def test_conv_step(dtype: torch.dtype, W: int) -> None:
    check.check_conv_step(native.conv_step, dtype, W)


def test_conv_step_of_many_channels() -> None:
    """More than one part of 1024 channels, the last one short."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 2069, generator=generator), torch.randn(2069, 4, generator=generator)
    states = torch.randn(3, 2069, 3, generator=generator)
    slots = torch.tensor([2, 0])
    wanted, last = check.conv(x, w, states[slots], [1, 1])
    got = native.conv_step(x, w, state_NCW=states, slots=slots)
    check.oracle.assert_close([got, states[slots]], [wanted, last], torch.float32)


def test_inputs_that_are_slices_of_one_projection() -> None:
    q, k, v, g, beta, _ = check.inputs(3, 1, torch.bfloat16, D=8, E=8)
    fused = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    parts = [x.unflatten(1, (-1, 8)) for x in fused.split([16, 16, 32], 1)]
    states = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    again = states.clone()
    slots = torch.tensor([1, 0, 2])
    o = native.delta_step(*parts, g, beta, state_NKDE=states, slots=slots, scale=1.0)
    assert torch.equal(o, native.delta_step(q, k, v, g, beta, state_NKDE=again, slots=slots, scale=1.0))
    assert torch.equal(states, again)


def test_a_batch_without_sequences() -> None:
    q, k, v, g, beta, state = check.inputs(0, 2, torch.float32)
    slots = torch.zeros(0, dtype=torch.int64)
    assert native.delta_step(q, k, v, g, beta, state_NKDE=state, slots=slots, scale=1.0).shape == (0, 4, 6)
    y = native.conv_step(torch.zeros(0, 7), torch.ones(7, 4), state_NCW=torch.ones(1, 7, 3), slots=slots)
    assert y.shape == (0, 7)


@pytest.mark.parametrize("slot", [-1, 2])
def test_slots_outside_of_the_states_are_refused(slot: int) -> None:
    q, k, v, g, beta, state = check.inputs(1, 2, torch.float32)
    slots = torch.tensor([slot])
    kept = state.clone()
    with pytest.raises(IndexError, match=f"slot {slot} of 2"):
        native.delta_step(q, k, v, g, beta, state_NKDE=state, slots=slots, scale=1.0)
    with pytest.raises(IndexError, match=f"slot {slot} of 2"):
        native.conv_step(torch.ones(1, 7), torch.ones(7, 4), state_NCW=torch.ones(2, 7, 3), slots=slots)
    assert torch.equal(state, kept)


def test_states_that_cannot_be_updated_in_place_are_refused() -> None:
    q, k, v, g, beta, state = check.inputs(1, 2, torch.float32)
    slots = torch.tensor([0])
    for wrong in (state.double(), state.mT, state[:, :3]):
        with pytest.raises(RuntimeError, match="state must be contiguous float32"):
            native.delta_step(q, k, v, g, beta, state_NKDE=wrong, slots=slots, scale=1.0)
    window = torch.ones(2, 7, 3)
    for wrong in (window.bfloat16(), torch.ones(7, 2, 3).transpose(0, 1), window[..., :2]):
        with pytest.raises(RuntimeError, match="state must be contiguous"):
            native.conv_step(torch.ones(1, 7), torch.ones(7, 4), state_NCW=wrong, slots=slots)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v, g, beta, state = check.inputs(1, 1, torch.float32, H=3)
    with pytest.raises(ValueError, match="4 value heads cannot be shared out over 3 key heads"):
        native.delta_step(q, k, v, g, beta, state_NKDE=state, slots=torch.tensor([0]), scale=1.0)
