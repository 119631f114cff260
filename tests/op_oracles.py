"""The conformance suite's float64 oracles, and the tolerances that these tests hold results to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grpo_conformance.ops.oracles import attention as attention
from grpo_conformance.ops.oracles import logprob as logprob
from grpo_conformance.ops.oracles import rms_norm as rms_norm
from grpo_conformance.ops.oracles import rotate as rotate

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8 * 2.0**-8}
"""Largest error over the largest value of the oracle.

float32: sums of up to some hundred products at 2^-24 each. bfloat16: a value is rounded at most eight times
on its way (scores, probabilities, their gradients, the result), each by 2^-9 and grown by scores up to 2.
"""


def with_grads(
    f: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], weigh: int = 0
) -> list[Tensor]:
    """Outputs of f, then the gradients of a fixed weighting of them; the inputs must stay as they are."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = f(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(7 + weigh)
    weights = [torch.rand(o.shape, generator=generator, dtype=torch.float64) - 0.5 for o in outputs]
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, leaves)
    for leaf, given in zip(leaves, inputs, strict=True):
        assert torch.equal(leaf.detach(), given), "an input was changed"
    return [o.detach() for o in outputs] + list(grads)


def assert_close(
    got: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype, factor: float = 1.0
) -> None:
    """Each tensor within TOLERANCE of its oracle, and in the dtype that it should have."""
    assert len(got) == len(wanted)
    for index, (x, y) in enumerate(zip(got, wanted, strict=True)):
        assert x.shape == y.shape, index
        if y.numel() == 0:
            continue
        error = float((x.double() - y.double()).abs().max())
        limit = factor * TOLERANCE[dtype] * max(float(y.abs().max()), 1e-3)
        assert error <= limit, f"result {index}: error {error:.3g} above {limit:.3g}"
