"""Checks of the Triton kernels at the edges of their tiles; called where Triton interprets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import op_oracles as oracle
import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def _normal(*shape: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(impl: Callable[..., Any], rows: int, size: int) -> None:
    """A residual whose sum alone is used further, weights of float32 beside bfloat16, strided rows."""
    for dtype in DTYPES:
        x, r = (_normal(rows, 2 * size, seed=seed).to(dtype)[:, ::2] for seed in (1, 2))
        w = _normal(size, seed=3)
        common: dict[str, Any] = {"eps": 1e-5, "zero_centered": True}
        got = oracle.with_grads(lambda x, w, r: impl(x, w, residual=r, **common), [x, w, r])  # noqa: B023
        wide = [x.double(), w.double(), r.double()]
        wanted = oracle.with_grads(
            lambda x, w, r: (oracle.rms_norm(x, w, residual=r, **common), x + r),  # noqa: B023
            wide,
        )
        oracle.assert_close(got, wanted, dtype)
    x, w, r = (part.requires_grad_() for part in (_normal(3, size), _normal(size), _normal(3, size)))
    _, total = impl(x, w, eps=1e-5, residual=r, zero_centered=False)
    g_x, g_w, g_r = torch.autograd.grad(total.sum(), (x, w, r), allow_unused=True)
    assert g_x.eq(1).all() and g_r.eq(1).all() and g_w is None


def norm_of_many_rows(impl: Callable[..., Any]) -> None:
    """More rows than programs of the backward pass: each adds up several."""
    from grpo_cuda import triton_blocks

    x, w = _normal(29, 1025), _normal(1025)
    common: dict[str, Any] = {"eps": 1e-6, "residual": None, "zero_centered": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_blocks, "STRIPES", 4)
        got = oracle.with_grads(lambda x, w: impl(x, w, **common), [x, w])
    wanted = oracle.with_grads(lambda x, w: oracle.rms_norm(x, w, **common), [x.double(), w.double()])
    oracle.assert_close(got, wanted, torch.float32)


def rope(impl: Callable[..., tuple[Tensor, Tensor]], head: int, pairs: int, interleaved: bool) -> None:
    """Heads of odd sizes, one key head, queries that are a slice of a fused projection."""
    angle = torch.linspace(-4, 4, 5 * pairs, dtype=torch.float64).view(5, pairs)
    fused = _normal(5, 4, head)
    q, k = fused[:, :3], fused[:, 3:]
    cos, sin = angle.cos().float(), angle.sin().float()
    got = oracle.with_grads(lambda q, k: impl(q, k, cos, sin, interleaved=interleaved), [q, k])
    wanted = oracle.with_grads(
        lambda q, k: tuple(oracle.rotate(x, angle, interleaved=interleaved) for x in (q, k)),
        [q.double(), k.double()],
    )
    oracle.assert_close(got, wanted, torch.float32)


def swiglu(impl: Callable[[Tensor], Tensor], rows: int, size: int) -> None:
    """Gates up to +-60, where exp overflows and the sigmoid is 0 or 1."""
    for dtype in DTYPES:
        x = _normal(rows, 2 * size, scale=15.0).clamp(-60, 60).to(dtype)
        x[0, 0], x[-1, size - 1] = -100.0, 100.0
        got = oracle.with_grads(impl, [x])
        wanted = oracle.with_grads(
            lambda x: torch.nn.functional.silu(x[..., :size]) * x[..., size:], [x.double()]
        )
        oracle.assert_close(got, wanted, dtype)


def _problem(T: int, V: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = _normal(T, C).to(dtype), _normal(V, C, seed=2, scale=2 * C**-0.5).to(dtype)
    labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(3))
    labels[0], labels[-1] = V - 1, 0
    return hidden, head, labels


def logprob(impl: Callable[..., tuple[Tensor, Tensor]], T: int, V: int, C: int) -> None:
    """Sizes around the edges of tiles and splits."""
    for dtype in DTYPES:
        hidden, head, labels = _problem(T, V, C, dtype)
        got = oracle.with_grads(
            lambda h, w: impl(h, w, labels, temperature=0.7, group=None),  # noqa: B023
            [hidden, head],
        )
        wanted = oracle.with_grads(
            lambda h, w: oracle.logprob(h, w, labels, 0.7),  # noqa: B023
            [hidden.double(), head.double()],
        )
        oracle.assert_close(got, wanted, dtype)


def logprob_in_pieces(impl: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Several chunks of tokens and words give what one gives, to autograd and as main gradient."""
    from grpo_cuda import triton_blocks

    hidden, head, labels = _problem(150, 300, 40, dtype)
    main = _normal(300, 40, seed=4)
    results = []
    for elements, tokens in ((1 << 27, 1 << 14), (128 * 70, 70)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_blocks, "ELEMENTS", elements)
            patch.setattr(triton_blocks, "TOKENS", tokens)
            added = main.clone()
            alone = oracle.with_grads(
                lambda h, w: impl(h, w, labels, temperature=1.3, group=None), [hidden, head]
            )
            h, w = (x.clone().requires_grad_() for x in (hidden, head))
            lp, entropy = impl(h, w, labels, temperature=1.3, group=None, main_grad_VC=added)
            (lp.sum() - 2 * entropy.sum()).backward()
            assert w.grad is None and h.grad is not None
            results.append([*alone, h.grad, added])
    oracle.assert_close(results[1], [x.double() for x in results[0]], dtype)


def extreme_logits(impl: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Logits of -inf, of 1e5, and all alike."""
    hidden = torch.ones(3, 16)
    head = _normal(5000, 16)
    head[::7, 0] = -torch.inf
    head[4990:, 0] = -torch.inf
    labels = torch.tensor([1, 7, 4095])
    found, entropy = impl(hidden, head, labels, temperature=1.0, group=None)
    wanted = torch.log_softmax(head.double().sum(1), 0)[labels]
    assert found[1] == -torch.inf and torch.allclose(found.double()[[0, 2]], wanted[[0, 2]], atol=1e-5)
    p = torch.softmax(head.double().sum(1), 0)
    assert torch.allclose(entropy.double(), torch.special.entr(p).sum(), atol=1e-5)
    large = _normal(300, 16, scale=1e4)
    got = oracle.with_grads(
        lambda h: impl(h, large, labels.clamp(max=299), temperature=1.0, group=None), [hidden]
    )
    wanted_all = oracle.with_grads(
        lambda h: oracle.logprob(h, large.double(), labels.clamp(max=299), 1.0), [hidden.double()]
    )
    assert all(x.isfinite().all() for x in got)
    oracle.assert_close(got[:1], wanted_all[:1], torch.float32)
    found, entropy = impl(hidden, torch.zeros(4100, 16), labels, temperature=2.0, group=None)
    flat = torch.tensor(4100.0).log()
    assert torch.allclose(entropy, flat) and torch.allclose(found, -flat)


def small_gradients_in_float16(impl: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Gradients of 1e-7 times probabilities of 1e-3 would be 0 in float16 on their way to the products."""
    hidden, head, labels = _problem(9, 900, 32, torch.float16)
    h = hidden.clone().requires_grad_()
    main = torch.zeros(900, 32)
    lp, entropy = impl(h, head, labels, temperature=1.0, group=None, main_grad_VC=main)
    (1e-7 * lp.sum() + 1e-7 * entropy.sum()).backward()
    wide = head.double().requires_grad_()
    sums = oracle.logprob(hidden.double(), wide, labels, 1.0)
    (1e-7 * (sums[0].sum() + sums[1].sum())).backward()
    assert wide.grad is not None
    error = float((main.double() - wide.grad).abs().max() / wide.grad.abs().max())
    assert error < 8 * 2.0**-11, error


class _Share:
    """One of two ranks that take turns: one runs while the other waits in a collective."""

    def __init__(
        self, rank: int, turn: threading.Lock, meet: threading.Barrier, seen: dict[int, Tensor]
    ) -> None:
        self.rank, self.size, self._turn, self._meet, self._seen = rank, 2, turn, meet, seen

    def all_reduce(self, x: Tensor, *, op: str) -> None:
        self._seen[self.rank] = x.clone()
        self._turn.release()
        self._meet.wait(60)
        both = torch.stack([self._seen[0], self._seen[1]])
        self._meet.wait(60)
        self._turn.acquire()
        x.copy_(both.amax(0) if op == "max" else both.sum(0))


def split_vocabulary(impl: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Two ranks with half of the head each give what one gives with all of it."""
    hidden, head, labels = _problem(5, 260, 24, torch.float32)
    whole = oracle.with_grads(
        lambda h, w: oracle.logprob(h, w, labels, 0.9), [hidden.double(), head.double()]
    )
    turn, meet, seen = threading.Lock(), threading.Barrier(2), dict[int, Tensor]()
    found: dict[int, list[Tensor]] = {}

    def work(rank: int) -> None:
        group = _Share(rank, turn, meet, seen)
        with turn:
            found[rank] = oracle.with_grads(
                lambda h, w: impl(h, w, labels, temperature=0.9, group=group),
                [hidden, head[130 * rank : 130 * (rank + 1)]],
            )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        wanted = [*whole[:3], whole[3][130 * rank : 130 * (rank + 1)]]
        oracle.assert_close(found[rank], wanted, torch.float32)


def adamw(impl: Callable[..., None]) -> None:
    """Tensors of several pieces, of odd addresses, without elements; copies of three dtypes."""
    flat = [_normal(40_100, seed=seed) for seed in (1, 2, 3)] + [_normal(40_100, seed=4).square()]
    sizes = [(1, 32_999), (33_001, 6999), (40_001, 0), (40_001, 1)]
    rows = [[x[start : start + size] for start, size in sizes] for x in flat]
    copies = [torch.empty(32_999, dtype=torch.float16), None, None, torch.empty(1, dtype=torch.bfloat16)]
    wide = [[x.double() for x in row] for row in rows]
    params, grads, first, second = rows
    impl(
        params, grads, first, second, step=3, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8,
        weight_decays=[0.1, 0.0, 0.0, 0.2], grad_scale=0.5, copies=copies,
    )  # fmt: skip
    for i, (p, g, m, v) in enumerate(zip(*wide, strict=True)):
        m = 0.9 * m + 0.1 * (0.5 * g)
        v = 0.99 * v + 0.01 * (0.5 * g) ** 2
        p = p * (1 - 0.1 * (0.1, 0.0, 0.0, 0.2)[i])
        p = p - 0.1 / (1 - 0.9**3) * m / ((v / (1 - 0.99**3)).sqrt() + 1e-8)
        oracle.assert_close([params[i], first[i], second[i]], [p, m, v], torch.float32)
        copy = copies[i]
        assert copy is None or torch.equal(copy, params[i].to(copy.dtype))
    outside = [x[[0, 33_000, 40_000, *range(40_002, 40_100)]] for x in flat]
    again = [_normal(40_100, seed=seed) for seed in (1, 2, 3)] + [_normal(40_100, seed=4).square()]
    assert all(
        torch.equal(x, y[[0, 33_000, 40_000, *range(40_002, 40_100)]])
        for x, y in zip(outside, again, strict=True)
    )


def adamw_refuses(impl: Callable[..., None]) -> None:
    how: dict[str, Any] = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8,
                           "weight_decays": [0.0], "grad_scale": 1.0, "copies": [None]}  # fmt: skip
    strided, half = [torch.zeros(4, 4).T], [torch.zeros(4, dtype=torch.bfloat16)]
    with pytest.raises(ValueError, match="contiguous"):
        impl(strided, strided, strided, strided, **how)
    with pytest.raises(ValueError, match="float32"):
        impl(half, half, half, half, **how)
