"""Functions of one place: the same bits wherever an element stands, and the values of torch's own."""

from __future__ import annotations

import pytest
import torch

from grpo_core.ops.reference import rowwise

PAIRS = {
    "sigmoid": (rowwise.sigmoid, torch.sigmoid),
    "silu": (rowwise.silu, torch.nn.functional.silu),
    "softplus": (rowwise.softplus, torch.nn.functional.softplus),
}
ENDS = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 88.0, -88.0, 104.0, -104.0, 1e30, -1e30]


def values(dtype: torch.dtype) -> torch.Tensor:
    spread = 8 * torch.randn(4001, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(ENDS), spread]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_a_place_does_not_matter(name: str, dtype: torch.dtype) -> None:
    ours, x = PAIRS[name][0], values(dtype)
    whole = ours(x)
    for start in (1, 5, 17, 4000):
        assert torch.equal(ours(x[start:]), whole[start:])
    assert torch.equal(ours(torch.stack([x, -x], 1)[:, 0]), whole)
    assert torch.equal(ours(x[::3]), whole[::3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    x, wide = values(dtype).requires_grad_(), values(dtype).double().requires_grad_()
    y, expected = ours(x), theirs(wide)
    g = torch.randn(len(x), generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(g)
    expected.backward(g.double())
    # A few roundings of exp and of products; torch's softplus is x itself above 20, off by exp(-20).
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=1e-8)
    assert x.grad is not None and wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=8 * eps, atol=4 * eps)


@pytest.mark.parametrize("width", [1, 3, 100, 4096, 4097, 40_000])
def test_row_sums_stand_alone(width: int) -> None:
    """A single row of more than 32768 elements is shared out over threads by torch's own sum."""
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    sums = rowwise.row_sum(x)
    torch.testing.assert_close(sums.double(), x.double().sum(-1), rtol=1e-5, atol=1e-3)
    for row in range(5):
        assert torch.equal(rowwise.row_sum(x[row : row + 1]), sums[row : row + 1])


def test_softmax_of_rows() -> None:
    x = (9 * torch.randn(40, 13, generator=torch.Generator().manual_seed(3))).requires_grad_()
    y = rowwise.softmax(x)
    torch.testing.assert_close(y, x.softmax(-1), rtol=1e-5, atol=1e-7)
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(x.softmax(-1).square().sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(rowwise.softmax(x[i : i + 1]), y[i : i + 1]) for i in range(40))
