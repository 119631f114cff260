"""What is particular to the torch offers of `moe.*` on a CPU."""

from __future__ import annotations

import moe_checks as check
import pytest
import torch

from grpo_core.ops.reference import moe as reference
from grpo_cpu import moe, rows

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PARTS = (moe.dispatch, moe.experts, moe.combine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", check.IDS)
def test_dispatch_experts_combine_in_pieces(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ELEMENTS", 1 << 10)  # pieces of a few tokens
    check.check_layer(PARTS, dtype, check.IDS[case])


def test_records_of_the_reference_and_of_this_plugin_are_the_same() -> None:
    """A pin may mix the two."""
    x, ids = check.randn(6, 32, dtype=torch.float32, seed=0), check.random_ids(6, 6, 2)
    weights = check.randn(6, 2, dtype=torch.float32, seed=1)
    results = [
        combine(dispatch(x, ids, num_experts=6, group=None)[0], weights,
                dispatch(x, ids, num_experts=6, group=None)[2])
        for dispatch in (reference.dispatch, moe.dispatch)
        for combine in (reference.combine, moe.combine)
    ]  # fmt: skip
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_a_gradient_takes_one_tensor_of_the_size_of_all_experts() -> None:
    """Indexing expert by expert made one of that size for each."""
    X, C, F = 16, 32, 32
    inputs = [check.randn(X, C, dtype=torch.float32, seed=0), *check.weights_of(X, C, F, torch.float32)]
    leaves = [x.requires_grad_() for x in inputs]
    large = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal large
            out = func(*args, **(kwargs or {}))
            made = isinstance(out, torch.Tensor) and out.numel() >= X * C * F and out._base is None
            large += made and "empty" in func.__name__ + str(func)
            return out

    y = moe.experts(*leaves, torch.ones(X, dtype=torch.int64))
    with Count():
        y.sum().backward()
    assert large == 2
