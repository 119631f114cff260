"""Norm, rotary, SwiGLU and AdamW of the C++ pack against float64 formulas and torch.optim."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_core.ops.reference import fused as reference
from grpo_cpu.native import compiler, cpu_flags

if "avx512_bf16" not in cpu_flags() or compiler() is None:
    pytest.skip("the C++ pack needs AVX512-BF16 and a compiler", allow_module_level=True)
native = importlib.import_module("grpo_cpu.native_ops")

# One rounding to bf16 is 2^-8 relative; two in a row (normed input, then the product) add up to 2^-7.
ONCE, TWICE = 2**-8 * 1.01, 2**-7
BF16, F32 = torch.bfloat16, torch.float32
FLOATS = pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "f32"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("width", [1, 16, 33, 576, 1000])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@FLOATS
def test_rms_norm_and_its_gradient(width, zero_centered, with_residual, dtype):
    # A float32 sum of 1000 squares in 16 lanes is off by 2^-19 at most, and as many products of a gradient.
    once, twice = (ONCE, TWICE) if dtype == BF16 else (2**-18, 2**-18)
    x, r = draw(130, width, dtype=dtype), draw(130, width, seed=1, dtype=dtype)
    w = draw(width, seed=2, dtype=dtype)
    ours = [t.clone().requires_grad_() for t in (x, w, r)]
    out = native.rms_norm(
        ours[0], ours[1], eps=1e-5, residual=ours[2] if with_residual else None, zero_centered=zero_centered
    )
    # The oracle gets the bf16 sum: where that rounds is the contract's choice, not the formula's.
    total = (x + r if with_residual else x).double().requires_grad_()
    w64 = w.double().requires_grad_()
    gain = 1 + w64 if zero_centered else w64
    y64 = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * gain
    dy, dtotal = draw(130, width, seed=3, dtype=dtype), draw(130, width, seed=4, dtype=dtype)
    y = out[0] if with_residual else out
    torch.testing.assert_close(y.double(), y64, rtol=twice, atol=1e-6)
    if with_residual:
        assert torch.equal(out[1], x + r)
        torch.autograd.backward([y, out[1]], [dy, dtotal])
        torch.autograd.backward([y64, total * 1], [dy.double(), dtotal.double()])
        assert torch.equal(ours[2].grad, ours[0].grad)
    else:
        y.backward(dy)
        y64.backward(dy.double())
    # Its two terms, each up to |dy w| / rms, may cancel.
    terms = (dy.double() * gain.detach()).abs() * torch.rsqrt(total.detach().square().mean(-1, True) + 1e-5)
    error = (ours[0].grad.double() - total.grad).abs()
    assert (error <= once * total.grad.abs() + 2**-21 * terms + 2e-6).all()
    # dw sums 130 products with the rounded input: 2^-8 (2^-20 with sums in float32) sqrt(130) of a product of
    # at most 4.
    slack = (2**-8 if dtype == BF16 else 2**-20) * 130**0.5 * 4
    torch.testing.assert_close(ours[1].grad.double(), w64.grad, rtol=once, atol=slack)
    assert torch.equal(ours[0], x) and torch.equal(ours[2], r)


def test_rms_norm_without_gradient_equals_the_reference_and_keeps_shape():
    x, r, w = draw(3, 5, 64), draw(3, 5, 64, seed=1), draw(64, seed=2)
    for residual in (None, r):
        got = native.rms_norm(x, w, eps=1e-6, residual=residual, zero_centered=False)
        want = reference.rms_norm(x, w, eps=1e-6, residual=residual, zero_centered=False)
        torch.testing.assert_close(got, want, rtol=TWICE, atol=0)


def test_only_the_sum_of_a_norm_used_still_gives_a_gradient():
    x, r, w = (t.requires_grad_() for t in (draw(4, 32), draw(4, 32, seed=1), draw(32, seed=2)))
    total = native.rms_norm(x, w, eps=1e-6, residual=r, zero_centered=False)[1]
    total.sum().backward()
    assert (
        torch.equal(x.grad, torch.ones_like(x)) and torch.equal(r.grad, torch.ones_like(r)) and w.grad is None
    )


def test_norm_weight_gradient_does_not_depend_on_threads():
    x, w, dy = draw(1000, 100), draw(100, seed=1), draw(1000, 100, seed=2)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaf = w.clone().requires_grad_()
            native.rms_norm(x, leaf, eps=1e-6, residual=None, zero_centered=False).backward(dy)
            found.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(1, 2), (7, 34), (2, 3, 96), (65, 3072), (0, 8)])
@FLOATS
def test_swiglu_and_its_gradient(shape, dtype):
    once = ONCE if dtype == BF16 else 2**-20
    x = (draw(*shape).float() * 3).to(dtype).requires_grad_()
    y = native.swiglu(x)
    x64 = x.detach().double().requires_grad_()
    gate, up = x64.chunk(2, -1)
    y64 = gate * torch.sigmoid(gate) * up
    dy = draw(*y.shape, seed=1, dtype=dtype)
    y.backward(dy)
    y64.backward(dy.double())
    torch.testing.assert_close(y.double(), y64, rtol=once, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=once, atol=1e-6)


@FLOATS
def test_swiglu_at_the_ends_of_the_range(dtype):
    gate = torch.tensor([-1e30, -200.0, -100.0, -90.0, 0.0, 90.0, 200.0, 1e30, float("nan")]).to(dtype)
    y = native.swiglu(torch.cat([gate, torch.ones_like(gate)]))
    want = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(y.double(), want, rtol=ONCE, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("D, R", [(64, 32), (64, 5), (96, 48), (32, 16), (6, 3), (128, 24)])
@FLOATS
def test_rope_and_its_gradient_on_slices_of_a_fused_projection(D, R, interleaved, dtype):
    # In float32 only the two products and their sum are rounded: the oracle gets the same cosines.
    once = ONCE if dtype == BF16 else 2**-20
    qkv = draw(9, 7, D, dtype=dtype).requires_grad_()
    q, k = qkv[:, :3], qkv[:, 3:5]
    angle = torch.rand(9, R, generator=torch.Generator().manual_seed(1)) * 6
    got = native.rope_apply(q, k, angle.cos(), angle.sin(), interleaved=interleaved)
    wide = qkv.detach().double().requires_grad_()
    want = reference.rope_apply(wide[:, :3], wide[:, 3:5], angle.cos(), angle.sin(), interleaved=interleaved)
    grads = [draw(*x.shape, seed=4 + i, dtype=dtype) for i, x in enumerate(got)]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [g.double() for g in grads])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=once, atol=1e-6)
    torch.testing.assert_close(qkv.grad.double(), wide.grad, rtol=once, atol=1e-6)


def test_adamw_equals_torch_optim():
    sizes, steps = [(1,), (17, 5), (40000,), (0,)], 7
    params = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(sizes)]
    theirs = [p.clone().double().requires_grad_() for p in params]
    groups = [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    copies = [p.bfloat16() for p in params[:2]] + [params[2].half(), None]
    for step in range(1, steps + 1):
        grads = [
            torch.randn(s, generator=torch.Generator().manual_seed(100 * step + i))
            for i, s in enumerate(sizes)
        ]
        kept = [g.clone() for g in grads]
        native.adamw(
            params,
            grads,
            first,
            second,
            step=step,
            lr=1e-3,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decays=[0.1, 0.1, 0.0, 0.0],
            grad_scale=0.5,
            copies=copies,
        )
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
        for leaf, grad in zip(theirs, grads, strict=True):
            leaf.grad = grad.double() * 0.5
        optimizer.step()
    for ours, want, copy in zip(params, theirs, copies, strict=True):
        # Each step moves by at most lr and rounds at 2^-24 of the value and of the move.
        torch.testing.assert_close(ours.double(), want.detach(), rtol=1e-6, atol=steps * 1e-3 * 1e-5)
        assert copy is None or torch.equal(copy, ours.to(copy.dtype))


def test_adamw_refuses_tensors_that_do_not_fit_together():
    a, b = torch.zeros(4), torch.zeros(5)
    with pytest.raises(RuntimeError, match="contiguous float32"):
        native.adamw(
            [a],
            [b],
            [a.clone()],
            [a.clone()],
            step=1,
            lr=1e-3,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decays=[0.0],
            grad_scale=1.0,
            copies=[None],
        )
