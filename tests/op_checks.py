"""Checks that every implementation of an op must pass; the test files name the implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import op_oracles as oracle
import pytest
import torch
from torch import Tensor

from grpo_conformance.ops.question import cumulative

LENGTHS = {
    "one token": ([1], [-1]),
    "ragged with an empty sequence": ([5, 0, 1, 7, 9, 30, 3], [-1] * 7),
    "equal": ([6, 6, 6], [-1] * 3),
    "groups": ([6, 4, 5, 9, 2, 7, 3, 12, 1], [-1, 0, 0, -1, 3, 3, 3, 3, 0]),
    "group of one, empty child, empty prompt": ([4, 3, 0, 0, 5], [-1, 0, 0, -1, 3]),
    "long beside short": ([40, 3, 90, 1], [-1, 0, 0, 0]),
}


def qkv(T: int, H: int, K: int, D: int, E: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((T, H, D), (T, K, D), (T, K, E))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check_shared_prefix(
    impl: Callable[..., Tensor], case: str, dtype: torch.dtype, window: int | None
) -> None:
    lengths, parents = LENGTHS[case]
    heads = (6, 2, 16, 8)  # grouped queries, and values of another size than keys
    inputs = qkv(sum(lengths), *heads, dtype)
    arguments: dict[str, Any] = {"scale": 0.25, "window": window}
    got = oracle.with_grads(
        lambda q, k, v: impl(
            q, k, v, cu_seqlens=cumulative(lengths), parents=torch.tensor(parents, dtype=torch.int32),
            max_seqlen=max(lengths), **arguments,
        ),
        inputs,
    )  # fmt: skip
    wanted = oracle.with_grads(
        lambda q, k, v: oracle.attention(q, k, v, lengths=lengths, parents=parents, causal=True, **arguments),
        [x.double() for x in inputs],
    )
    oracle.assert_close(got, wanted, dtype)
    assert got[0].dtype == dtype


def check_varlen(
    impl: Callable[..., Tensor], case: str, dtype: torch.dtype, window: int | None, causal: bool
) -> None:
    lengths, _ = LENGTHS[case]
    inputs = qkv(sum(lengths), 4, 4, 8, 8, dtype)
    arguments: dict[str, Any] = {"scale": 0.3, "window": window, "causal": causal}
    got = oracle.with_grads(
        lambda q, k, v: impl(q, k, v, cu_seqlens=cumulative(lengths), max_seqlen=max(lengths), **arguments),
        inputs,
    )
    wanted = oracle.with_grads(
        lambda q, k, v: oracle.attention(q, k, v, lengths=lengths, parents=[-1] * len(lengths), **arguments),
        [x.double() for x in inputs],
    )
    oracle.assert_close(got, wanted, dtype)


def check_packed_isolation(varlen: Callable[..., Tensor], shared_prefix: Callable[..., Tensor]) -> None:
    """A sequence of NaN must not reach its neighbours, forward or backward."""
    lengths, parents = [5, 7, 6, 3], [-1, 0, -1, 0]
    poisoned = slice(12, 18)
    q, k, v = qkv(sum(lengths), 2, 1, 8, 8, torch.float32)
    for x in (q, k, v):
        x[poisoned] = torch.nan
    clean = torch.ones(sum(lengths), dtype=torch.bool)
    clean[poisoned] = False
    for family in (None, torch.tensor(parents, dtype=torch.int32)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        common = {"cu_seqlens": cumulative(lengths), "max_seqlen": 7, "scale": 0.3, "window": None}
        if family is None:
            o = varlen(*leaves, causal=True, **common)
        else:
            o = shared_prefix(*leaves, parents=family, **common)
        grads = torch.autograd.grad(o, leaves, torch.ones_like(o))
        assert o[clean].isfinite().all()
        assert o[~clean].isnan().all()
        assert all(grad[clean].isfinite().all() for grad in grads)


def check_bad_packing(varlen: Callable[..., Tensor], shared_prefix: Callable[..., Tensor]) -> None:
    q, k, v = qkv(4, 2, 2, 4, 4, torch.float32)
    for wrong in ([0, 2], [1, 4], [0, 3, 2, 4], []):
        with pytest.raises(ValueError, match="cu_seqlens"):
            varlen(
                q, k, v, cu_seqlens=torch.tensor(wrong, dtype=torch.int32), max_seqlen=4, scale=1.0,
                causal=True, window=None,
            )  # fmt: skip
    for wrong in ([0, -1], [-1, 1], [-1, -2], [-1, 0, 1], [-1]):
        cu = torch.tensor([0, 1, 2, 4] if len(wrong) == 3 else [0, 2, 4], dtype=torch.int32)
        with pytest.raises(ValueError, match="parent"):
            shared_prefix(
                q, k, v, cu_seqlens=cu, parents=torch.tensor(wrong, dtype=torch.int32), max_seqlen=2,
                scale=1.0, window=None,
            )  # fmt: skip


def check_rms_norm(
    impl: Callable[..., Any], dtype: torch.dtype, rows: int, zero_centered: bool, residual: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, r = (torch.randn(rows, 3, 48, generator=generator).to(dtype) for _ in range(2))
    w = torch.rand(48, generator=generator).to(dtype)
    common: dict[str, Any] = {"eps": 1e-5, "zero_centered": zero_centered}
    if not residual:
        got = oracle.with_grads(lambda x, w: impl(x, w, residual=None, **common), [x, w])
        wanted = oracle.with_grads(
            lambda x, w: oracle.rms_norm(x, w, residual=None, **common), [x.double(), w.double()]
        )
    else:
        got = oracle.with_grads(lambda x, w, r: impl(x, w, residual=r, **common), [x, w, r])
        wanted = oracle.with_grads(
            lambda x, w, r: (oracle.rms_norm(x, w, residual=r, **common), x + r),
            [x.double(), w.double(), r.double()],
        )
    oracle.assert_close(got, wanted, dtype)
    assert got[0].dtype == dtype


def check_rope(
    impl: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, interleaved: bool, R: int
) -> None:
    q, k, _ = qkv(9, 4, 2, 12, 12, dtype)
    angle = torch.linspace(-3, 3, 9 * R).view(9, R)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = angle.double().cos().to(wide), angle.double().sin().to(wide)
    got = oracle.with_grads(lambda q, k: impl(q, k, cos, sin, interleaved=interleaved), [q, k])
    wanted = oracle.with_grads(
        lambda q, k: tuple(oracle.rotate(x, angle, interleaved=interleaved) for x in (q, k)),
        [q.double(), k.double()],
    )
    oracle.assert_close(got, wanted, dtype)
    assert got[0].dtype == dtype


def check_swiglu(impl: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = (4 * torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(3))).to(dtype)
    got = oracle.with_grads(impl, [x])
    wanted = oracle.with_grads(lambda x: torch.nn.functional.silu(x[..., :20]) * x[..., 20:], [x.double()])
    oracle.assert_close(got, wanted, dtype)


def check_logprob(impl: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, T: int, V: int) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(T, 24, generator=generator).to(dtype)
    head = (0.3 * torch.randn(V, 24, generator=generator)).to(dtype)
    labels = torch.randint(0, V, (T,), generator=generator)
    got = oracle.with_grads(lambda h, w: impl(h, w, labels, temperature=0.7, group=None), [hidden, head])
    wanted = oracle.with_grads(
        lambda h, w: oracle.logprob(h, w, labels, 0.7), [hidden.double(), head.double()]
    )
    oracle.assert_close(got, wanted, dtype)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for index in (0, 1):  # one result alone has the gradient of the oracle's one result
        alone = oracle.with_grads(
            lambda h, w, i=index: impl(h, w, labels, temperature=0.7, group=None)[i], [hidden, head]
        )
        right = oracle.with_grads(
            lambda h, w, i=index: oracle.logprob(h, w, labels, 0.7)[i], [hidden.double(), head.double()]
        )
        oracle.assert_close(alone, right, dtype)


def check_logprob_refuses(impl: Callable[..., tuple[Tensor, Tensor]]) -> None:
    hidden, head = torch.randn(2, 4), torch.randn(3, 4)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            impl(hidden, head, torch.tensor([0, 1]), temperature=temperature, group=None)
    for label in (3, -1):
        with pytest.raises(IndexError, match="label"):
            impl(hidden, head, torch.tensor([0, label]), temperature=1.0, group=None)


def check_adamw(impl: Callable[..., None], grad_scale: float) -> None:
    """Five steps against torch.optim.AdamW in float64, from equal states, copies included."""
    generator = torch.Generator().manual_seed(5)
    params = [torch.randn(shape, generator=generator) for shape in ((7, 5), (300,), (1,))]
    decays = [0.1, 0.0, 0.1]
    wide = [p.double().requires_grad_() for p in params]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(wide, decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    copies = [params[0].bfloat16(), None, params[2].bfloat16()]
    for step in range(1, 6):
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        for p, g in zip(wide, grads, strict=True):
            p.grad = g.double() * grad_scale
        optimizer.step()
        impl(
            params, grads, first, second, step=step, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8,
            weight_decays=decays, grad_scale=grad_scale, copies=copies,
        )  # fmt: skip
    oracle.assert_close(params, [p.detach() for p in wide], torch.float32)
    moments = [optimizer.state[p] for p in wide]
    oracle.assert_close(first, [m["exp_avg"] for m in moments], torch.float32)
    oracle.assert_close(second, [m["exp_avg_sq"] for m in moments], torch.float32)
    assert torch.equal(copies[0], params[0].bfloat16())
    assert torch.equal(copies[2], params[2].bfloat16())
