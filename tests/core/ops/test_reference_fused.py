from __future__ import annotations

import op_checks as check
import pytest
import torch

from grpo_core.ops.reference import fused, logprob

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [1, 6])
def test_rms_norm(rows: int, residual: bool, zero_centered: bool, dtype: torch.dtype) -> None:
    check.check_rms_norm(fused.rms_norm, dtype, rows, zero_centered, residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [6, 4])
def test_rope(pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    check.check_rope(fused.rope_apply, dtype, interleaved, pairs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype: torch.dtype) -> None:
    check.check_swiglu(fused.swiglu, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "vocab"), [(1, 1), (1, 7), (23, 40), (0, 5)])
def test_logprob(tokens: int, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", 5 * vocab)  # chunks of five tokens, the last one short
    check.check_logprob(fused.logprob, dtype, tokens, vocab)


def test_logprob_refuses_temperatures_and_labels_that_make_no_sense() -> None:
    check.check_logprob_refuses(fused.logprob)


def test_logprob_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    head = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: fused.logprob(h, w, labels, temperature=1.3, group=None), (hidden, head)
    )


def test_logprob_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob, "CHUNK_ELEMENTS", 8 * 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, head = torch.randn(200, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    with Watch():
        values, entropy = fused.logprob(
            hidden, head, torch.randint(0, 64, (200,)), temperature=1.0, group=None
        )
        (values.sum() + entropy.sum()).backward()
    assert largest == max(8 * 64, 200 * 4)


class TwoHalves:
    """A tensor-parallel group of two ranks, one call of each played by a thread."""

    size = 2

    def __init__(self, rank: int, board: list[torch.Tensor | None], barrier) -> None:  # type: ignore[no-untyped-def]
        self.rank, self.board, self.barrier = rank, board, barrier

    def all_reduce(self, x: torch.Tensor, *, op: str) -> None:
        self.board[self.rank] = x.clone()
        self.barrier.wait(30)
        both = torch.stack([b for b in self.board if b is not None])
        self.barrier.wait(30)
        x.copy_(both.sum(0) if op == "sum" else both.amax(0))


def test_logprob_over_a_vocabulary_split_between_two_ranks() -> None:
    import threading

    torch.manual_seed(0)
    hidden, head = torch.randn(9, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    labels, weights = torch.randint(0, 12, (9,)), torch.randn(2, 9, dtype=torch.float64)

    def run(head: torch.Tensor, group: object) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        out = fused.logprob(h, w, labels, temperature=0.8, group=group)
        grads = torch.autograd.grad((torch.stack(out) * weights).sum(), (h, w))
        return [*(o.detach() for o in out), *grads]

    whole = run(head, None)
    board, barrier, halves = [None, None], threading.Barrier(2), {}
    threads = [
        threading.Thread(
            target=lambda r=r: halves.update({r: run(head.chunk(2)[r], TwoHalves(r, board, barrier))})
        )
        for r in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        for got, want in zip(halves[rank][:3], whole[:3], strict=True):
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.cat([halves[0][3], halves[1][3]]), whole[3])


@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
def test_adamw(grad_scale: float) -> None:
    check.check_adamw(fused.adamw, grad_scale)


def test_plain_linear_updates_in_place_without_touching_the_source() -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    layer = fused.PlainLinear(weight, bias)
    source = torch.randn(3, 4)
    kept = source.clone()
    layer.update(source, bias + 1)
    source.zero_()
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), x @ kept.T + bias)
    assert layer.nbytes() == 0
    with pytest.raises(ValueError, match="cannot take"):
        layer.update(torch.randn(4, 3), bias)
    with pytest.raises(ValueError, match="cannot take"):
        layer.update(kept, None)
