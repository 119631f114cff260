"""Checks of the gated delta rule and the short convolution, against loops over the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import op_oracles as oracle
import torch
from torch import Tensor
from torch.nn.functional import normalize

from grpo_conformance.ops.delta_oracles import conv, delta_rule
from grpo_conformance.ops.question import cumulative

Chunk = Callable[..., tuple[Tensor, Tensor | None]]

LENGTHS = {
    "one": [1],
    "chunk boundaries": [63, 64, 65],
    "empty ones": [0, 1, 0, 70, 0],
    "many": [3, 130, 17, 64, 1, 33],
    "long": [300, 5],
}
DECAYS = {"mild": 0.1, "none": 0.0, "mixed": 20.0, "strong": -20.0}
"""g is drawn from [-x, 0]; "mixed" has steps that forget everything among steps that forget nothing, and
"strong" is -20 everywhere."""


def inputs(
    T: int, S: int, dtype: torch.dtype, *, H: int = 2, K: int = 4, D: int = 8, E: int = 6, decay: float = 0.1
) -> list[Tensor]:
    """q, k, v, g, beta and initial states; g and beta are float32, as in the contract, or float64."""
    generator = torch.Generator().manual_seed(T + S)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k = (normalize(torch.randn(T, H, D, generator=generator), dim=-1).to(dtype) for _ in range(2))
    v = torch.randn(T, K, E, generator=generator).to(dtype)
    g = -decay * torch.rand(T, K, generator=generator)
    if decay < 0:
        g = torch.full((T, K), decay)
    elif decay > 10:
        g = g * (torch.rand(T, K, generator=generator) < 0.1)
    beta = torch.rand(T, K, generator=generator)
    state = torch.randn(S, K, D, E, generator=generator)
    return [q, k, v, g.to(wide), beta.to(wide), state.to(wide)]


def check_chunk(
    impl: Chunk, dtype: torch.dtype, lengths: Sequence[int], *, decay: float, H: int = 2, start: bool = True
) -> None:
    """Outputs, last states and every gradient, with and without states to start from."""
    given = inputs(sum(lengths), len(lengths), dtype, decay=decay, H=H)
    cu_seqlens = cumulative(lengths)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None) -> Any:
        return impl(
            q, k, v, g, beta, cu_seqlens=cu_seqlens, scale=0.3, initial_state_SKDE=state, final_state=True
        )

    def expected(*x: Tensor) -> Any:
        return delta_rule(*x[:5], x[5] if start else None, lengths, 0.3)

    given = given if start else given[:5]
    got = oracle.with_grads(run, given)
    wanted = oracle.with_grads(expected, [x.double() for x in given])
    assert got[0].dtype == dtype
    assert got[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle.assert_close(got, wanted, dtype)


def check_no_tokens(chunk: Chunk, convolve: Chunk) -> None:
    """Segments without tokens end as they start; a batch may have no segments at all."""
    for S in (2, 0):
        given = inputs(0, S, torch.float32)
        common: dict[str, Any] = {"cu_seqlens": cumulative([0] * S), "final_state": True}
        o, last = chunk(*given[:5], scale=1.0, initial_state_SKDE=given[5], **common)
        assert o.shape == (0, 4, 6) and torch.equal(last, given[5])
        _, last = chunk(*given[:5], scale=1.0, initial_state_SKDE=None, **common)
        assert torch.equal(last, torch.zeros_like(given[5]))
        window = torch.rand(S, 7, 3)
        y, last = convolve(torch.zeros(0, 7), torch.ones(7, 4), initial_state_SCW=window, **common)
        assert y.shape == (0, 7) and torch.equal(last, window)


def check_output_alone(impl: Chunk) -> None:
    """Without the last state: the same output and gradients, and None."""
    lengths = [5, 70]
    given = inputs(75, 2, torch.float32)
    common: dict[str, Any] = {"cu_seqlens": cumulative(lengths), "scale": 0.3}

    def run(*x: Tensor, final_state: bool = False) -> Tensor:
        o, last = impl(*x[:5], initial_state_SKDE=x[5], final_state=final_state, **common)
        assert (last is not None) == final_state
        return o

    alone = oracle.with_grads(run, given)
    both = oracle.with_grads(lambda *x: run(*x, final_state=True), given)
    for x, y in zip(alone, both, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def check_last_state_alone(impl: Chunk) -> None:
    """A prompt whose output is not used still passes gradients from the generations that start from it."""
    given = inputs(70, 1, torch.float64)
    got = oracle.with_grads(
        lambda *x: impl(
            *x[:5], cu_seqlens=cumulative([70]), scale=0.3, initial_state_SKDE=x[5], final_state=True
        )[1] + 0 * x[0].sum(), given,
    )  # fmt: skip
    wanted = oracle.with_grads(lambda *x: delta_rule(*x, [70], 0.3)[1] + 0 * x[0].sum(), given)
    oracle.assert_close(got, wanted, torch.float64)


def check_split_anywhere(impl: Chunk, cuts: Sequence[int]) -> None:
    """A sequence in pieces, each started from the state before it, is the sequence; and so packed ones."""
    ends = [*sorted(cuts), 150]
    given = inputs(150, 1, torch.float64, decay=2.0)
    tokens, state = given[:5], given[5]
    whole_o, whole_last = impl(
        *tokens, cu_seqlens=cumulative([150]), scale=0.3, initial_state_SKDE=state, final_state=True
    )
    pieces, at = [], 0
    for end in ends:
        o, state = impl(
            *(x[at:end] for x in tokens), cu_seqlens=cumulative([end - at]), scale=0.3,
            initial_state_SKDE=state, final_state=True,
        )  # fmt: skip
        pieces.append(o)
        at = end
    oracle.assert_close([torch.cat(pieces), state], [whole_o, whole_last], torch.float64)


def check_packed_is_separate(impl: Chunk, lengths: Sequence[int]) -> None:
    """A packed batch gives what its sequences give alone, and NaN in one stays in it."""
    given = inputs(sum(lengths), len(lengths), torch.float64)
    common: dict[str, Any] = {"scale": 0.3, "final_state": True}
    o, last = impl(*given[:5], cu_seqlens=cumulative(lengths), initial_state_SKDE=given[5], **common)
    poisoned = [x.clone() for x in given]
    at = 0
    for segment, length in enumerate(lengths):
        part = slice(at, at + length)
        at += length
        alone_o, alone_last = impl(
            *(x[part] for x in given[:5]), cu_seqlens=cumulative([length]),
            initial_state_SKDE=given[5][segment : segment + 1], **common,
        )  # fmt: skip
        oracle.assert_close([o[part], last[segment : segment + 1]], [alone_o, alone_last], torch.float64)
        if segment == 1:
            for x in poisoned[:5]:
                x[part] = torch.nan
            sick = part
    clean = torch.ones(sum(lengths), dtype=torch.bool)
    clean[sick] = False
    leaves = [x.requires_grad_() for x in poisoned]
    o_nan, _ = impl(*leaves[:5], cu_seqlens=cumulative(lengths), initial_state_SKDE=leaves[5], **common)
    grads = torch.autograd.grad(o_nan.sum(), leaves)
    assert o_nan[clean].isfinite().all() and o_nan[~clean].isnan().all()
    assert all(grad[clean].isfinite().all() for grad in grads[:5])
    others = [segment for segment in range(len(lengths)) if segment != 1]
    assert grads[5][others].isfinite().all()


def check_step(
    impl: Callable[..., Tensor], dtype: torch.dtype, B: int, *, H: int = 2, D: int = 8, E: int = 6
) -> None:
    """A few steps of sequences in scattered slots; other slots and all inputs stay as they are."""
    generator = torch.Generator().manual_seed(B)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = [inputs(B, 1, dtype, decay=3.0, H=H, D=D, E=E)[:5] for _ in range(3)]
    states = torch.randn(B + 3, 4, D, E, generator=generator, dtype=wide)
    slots = torch.randperm(B + 3, generator=generator)[:B]
    wanted_state, kept = states[slots].double(), states.clone()
    for given in steps:
        before = [x.clone() for x in given]
        got = impl(*given, state_NKDE=states, slots=slots, scale=0.3)
        wanted, wanted_state = delta_rule(*given, wanted_state, [1] * B, 0.3)
        assert got.dtype == dtype
        oracle.assert_close([got], [wanted], dtype)
        oracle.assert_close([states[slots]], [wanted_state], wide)
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
    others = torch.ones(B + 3, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(states[others], kept[others])


def check_conv(
    impl: Chunk, dtype: torch.dtype, lengths: Sequence[int], *, W: int = 4, start: bool = True, C: int = 7
) -> None:
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(sum(lengths), C, generator=generator).to(dtype)]
    given += [torch.randn(C, W, generator=generator).to(dtype)]
    given += [torch.randn(len(lengths), C, W - 1, generator=generator).to(dtype)] if start else []
    cu_seqlens = cumulative(lengths)

    def run(x: Tensor, w: Tensor, state: Tensor | None = None) -> Any:
        return impl(x, w, cu_seqlens=cu_seqlens, initial_state_SCW=state, final_state=True)

    def expected(*x: Tensor) -> Any:
        return conv(x[0], x[1], x[2] if start else None, lengths)

    got = oracle.with_grads(run, given)
    wanted = oracle.with_grads(expected, [x.double() for x in given])
    assert got[0].dtype == got[1].dtype == dtype
    oracle.assert_close(got, wanted, dtype)
    y, nothing = impl(
        *given[:2], cu_seqlens=cu_seqlens, initial_state_SCW=given[2] if start else None, final_state=False
    )
    assert nothing is None and torch.equal(y, got[0])


def check_conv_keeps_to_its_segment(impl: Chunk) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(9, 3, generator=generator), torch.randn(3, 4, generator=generator)
    x[3:5] = torch.nan
    x.requires_grad_()
    y, last = impl(x, w, cu_seqlens=cumulative([3, 2, 4]), initial_state_SCW=None, final_state=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    clean = torch.tensor([True] * 3 + [False] * 2 + [True] * 4)
    assert y[clean].isfinite().all() and y[~clean].isnan().all() and grad[clean].isfinite().all()
    assert last[[0, 2]].isfinite().all()


def check_conv_step(impl: Callable[..., Tensor], dtype: torch.dtype, W: int = 4) -> None:
    """Steps equal the convolution of the whole sequence; other slots and all inputs stay."""
    generator = torch.Generator().manual_seed(4)
    x_BTC = torch.randn(3, 6, 5, generator=generator).to(dtype)
    w = torch.randn(5, W, generator=generator).to(dtype)
    states = torch.randn(6, 5, W - 1, generator=generator).to(dtype)
    slots, kept = torch.tensor([4, 0, 3]), states.clone()
    wanted, last = conv(x_BTC.flatten(0, 1), w, states[slots], [6] * 3)
    for t in range(6):
        x = x_BTC[:, t].clone()
        got = impl(x, w, state_NCW=states, slots=slots)
        oracle.assert_close([got], [wanted.view(3, 6, 5)[:, t]], dtype)
        assert got.dtype == dtype and torch.equal(x, x_BTC[:, t])
    assert torch.equal(states[slots].double(), last)
    assert torch.equal(states[[1, 2, 5]], kept[[1, 2, 5]])
