"""What is particular to gated_delta.chunk and short_conv.varlen of the C++ pack: widths, threads, strides."""

from __future__ import annotations

import importlib
from itertools import pairwise

import delta_checks as check
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_recurrent")


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_convolution_of_many_channels_and_tokens(dtype: torch.dtype) -> None:
    """Several groups of channels take turns over blocks of tokens, on one thread and on two."""
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for W in (4, 3, 1):
                check.check_conv(native.conv_varlen, dtype, [70, 0, 32, 33, 2], W=W, C=275)
    finally:
        torch.set_num_threads(threads)


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
