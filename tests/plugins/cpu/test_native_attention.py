"""Packed training attention of the C++ pack, forward and backward, against the reference in float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from grpo_core.ops.reference import attention as reference
from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_attention")


FLOATS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])


def inputs(lengths, H, K, D, E, seed=0, dtype=torch.bfloat16):
    """q, k, v as slices of one fused projection (not contiguous), and cu_seqlens."""
    T = sum(lengths)
    fused = torch.randn(T, H * D + K * D + K * E, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q, k, v = fused.split([H * D, K * D, K * E], 1)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return q.view(T, H, D), k.view(T, K, D), v.view(T, K, E), cu


def visible_tokens(lengths, parents, causal: bool, window: int | None):
    """Which packed token sees which, bool [T, T], straight from the contract's words."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    above = torch.tensor(parents)[segment]
    shift = torch.tensor([0 if p < 0 else lengths[p] for p in parents])[segment]
    first = torch.tensor([0, *itertools.accumulate(lengths)])[segment]
    position = torch.arange(len(segment)) - first + shift
    back = position[:, None] - position[None, :]
    own, parent = segment[:, None] == segment[None, :], above[:, None] == segment[None, :]
    seen = (own & (back >= 0 if causal else torch.ones_like(own))) | parent
    return seen if window is None else seen & (back < window)


def oracle(q, k, v, grad, seen, scale):
    """o, dq, dk, dv in float64 and a bound on what the dtype may change in each element.

    With u = 2^-8 in bfloat16 and 2^-24 in float32: weights P and gradients dS are rounded by u before they
    are summed, o is rounded by u before rowsum(dO o) is taken from it, and every result is rounded by u.
    Float32 sums add about 2^-20 of the magnitudes summed. In float32 it counts too that a weight is off by
    the error of its score, a sum of up to 256 products, and by that of the log of the sum: 2^-19.
    """
    u, noise = (2**-8, 2**-20) if q.dtype == torch.bfloat16 else (2**-24, 2**-19)
    G = q.shape[1] // k.shape[1]
    q, k, v, g = (
        x.double().transpose(0, 1) for x in (q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1), grad)
    )
    weights = ((q @ k.mT) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    o = weights @ v
    delta, slack = (g * o).sum(-1, keepdim=True), u * (g * o).abs().sum(-1, keepdim=True)
    dp = g @ v.mT
    ds = weights * (dp - delta) * scale
    wide = scale * weights * (g.abs() @ v.abs().mT + (g * o).abs().sum(-1, keepdim=True))
    loose = u * ds.abs() + scale * weights * slack + noise * wide

    def fold(x):
        return x.unflatten(0, (-1, G)).sum(1).transpose(0, 1)

    want = [o.transpose(0, 1), (ds @ k).transpose(0, 1), fold(ds.mT @ q), fold(weights.mT @ g)]
    bounds = [
        (u + noise) * (weights @ v.abs()).transpose(0, 1),
        (loose @ k.abs()).transpose(0, 1),
        fold(loose.mT @ q.abs()),
        (u + noise) * fold(weights.mT @ g.abs()),
    ]
    return want, [1.01 * (bound + u * x.abs()) + 1e-30 for bound, x in zip(bounds, want, strict=True)]


def compare(op, lengths, parents, q, k, v, options):
    """Output and gradients against the dense oracle, and the output against the reference."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = getattr(native, op)(*leaves, max_seqlen=max(lengths), **options)
    grad = torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)
    o.backward(grad)
    seen = visible_tokens(lengths, parents, options.get("causal", True), options["window"])
    want, bounds = oracle(q, k, v, grad, seen, options["scale"])
    spec = getattr(reference, op)(q.double(), k.double(), v.double(), max_seqlen=max(lengths), **options)
    torch.testing.assert_close(spec, want[0])
    for name, got, exact, bound in zip("oqkv", [o, *(x.grad for x in leaves)], want, bounds, strict=True):
        assert got.dtype == q.dtype and got.shape == exact.shape
        excess = (got.double() - exact).abs() / bound
        assert excess.max() <= 1, f"{name} is off by {excess.max():.2f} of what rounding explains"


SHAPES = [(9, 3, 64, 64), (4, 4, 32, 96), (8, 1, 128, 128), (14, 2, 96, 32), (3, 3, 256, 64)]


@pytest.mark.parametrize("H, K, D, E", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 40])
@FLOATS
def test_varlen(H, K, D, E, causal, window, dtype):
    lengths = [1, 32, 33, 0, 97, 2, 16, 17]
    q, k, v, cu = inputs(lengths, H, K, D, E, dtype=dtype)
    options = {"cu_seqlens": cu, "scale": D**-0.5, "causal": causal, "window": window}
    compare("varlen", lengths, [-1] * 8, q, k, v, options)


@pytest.mark.parametrize("H, K, D, E", SHAPES)
@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize(
    "lengths, parents",
    [
        ([45, 70, 1, 33, 32, 20, 64], [-1, 0, 0, 0, -1, 4, 4]),
        ([40], [-1]),
        ([31, 50], [-1, 0]),
        ([5, 9, 7, 3], [-1, -1, 1, 0]),
        ([0, 8, 0], [-1, 0, 0]),
        ([1, 1, 1], [-1, 0, 0]),
        ([16, 15, 16, 17], [-1, 0, 0, 0]),
    ],
    ids=[
        "two groups", "prefix only", "group of one", "interleaved", "empty segments", "single tokens",
        "half blocks",
    ],
)  # fmt: skip
@FLOATS
def test_shared_prefix(H, K, D, E, window, lengths, parents, dtype):
    q, k, v, cu = inputs(lengths, H, K, D, E, dtype=dtype)
    options = {
        "cu_seqlens": cu,
        "parents": torch.tensor(parents, dtype=torch.int32),
        "scale": D**-0.5,
        "window": window,
    }
    compare("shared_prefix", lengths, parents, q, k, v, options)


@FLOATS
def test_a_long_segment_is_cut_into_tiles(dtype):
    lengths, parents = [900, 400], [-1, 0]
    q, k, v, cu = inputs(lengths, 2, 1, 32, 32, dtype=dtype)
    options = {"cu_seqlens": cu, "parents": torch.tensor(parents), "scale": 32**-0.5, "window": None}
    compare("shared_prefix", lengths, parents, q, k, v, options)


@FLOATS
def test_large_scores_keep_finite_gradients(dtype):
    q, k, v, cu = inputs([60, 30], 2, 1, 64, 64, dtype=dtype)
    q = (q.float() * 100).to(dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = native.varlen(*leaves, cu_seqlens=cu, max_seqlen=60, scale=1.0, causal=True, window=None)
    o.sum().backward()
    assert o.isfinite().all() and all(x.grad.isfinite().all() for x in leaves)


@FLOATS
def test_runs_are_bit_equal_for_any_number_of_threads_and_leave_inputs_alone(dtype):
    q, k, v, cu = inputs([30, 40, 50, 20, 60, 10], 6, 3, 64, 64, dtype=dtype)
    parents, threads, found = torch.tensor([-1, 0, 0, -1, 3, 3]), torch.get_num_threads(), []
    before = [x.clone() for x in (q, k, v)]
    try:
        for count in (1, 4, 4):
            torch.set_num_threads(count)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            o = native.shared_prefix(
                *leaves, cu_seqlens=cu, parents=parents, max_seqlen=60, scale=0.1, window=None
            )
            o.backward(torch.ones_like(o) + o.detach())
            found.append([o, *(x.grad for x in leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_without_gradient_the_output_is_the_same():
    q, k, v, cu = inputs([30, 40], 2, 2, 32, 32)
    options = {"cu_seqlens": cu, "max_seqlen": 40, "scale": 0.2, "causal": True, "window": None}
    with torch.no_grad():
        plain = native.varlen(q, k, v, **options)
    assert torch.equal(plain, native.varlen(q.detach().requires_grad_(), k, v, **options))


def test_tensors_of_two_dtypes_are_an_error():
    q, k, v, cu = inputs([2, 2], 1, 1, 32, 32)
    with pytest.raises(RuntimeError, match="k must be a tensor of BFloat16"):
        native.varlen(q, k.float(), v, cu_seqlens=cu, max_seqlen=2, scale=1.0, causal=True, window=None)
    with pytest.raises(RuntimeError, match="q must be a tensor of bfloat16 or float32"):
        native.varlen(*(x.double() for x in (q, k, v)), cu_seqlens=cu, max_seqlen=2, scale=1.0, causal=True,
                      window=None)  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parents": torch.tensor([-1, 1])}, "parent"),
        ({"parents": torch.tensor([1, -1])}, "parent"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 2, 9])}, "cu_seqlens"),
    ],
)
def test_descriptions_that_do_not_fit_the_tokens_are_errors(change, message):
    q, k, v, cu = inputs([2, 2], 1, 1, 32, 32)
    options = {
        "cu_seqlens": cu,
        "parents": torch.tensor([-1, 0]),
        "max_seqlen": 2,
        "scale": 1.0,
        "window": None,
    }
    with pytest.raises(ValueError, match=message):
        native.shared_prefix(q, k, v, **(options | change))
