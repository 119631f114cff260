"""Independent float64 oracles of the ops and the tolerances that results are held to.

Nothing here uses the references of core: torch's own functions in float64, complex arithmetic and
textbook formulas only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8 * 2.0**-8}
"""Largest error over the largest value of the oracle.

float32: sums of up to some hundred products at 2^-24 each. bfloat16: a value is rounded at most eight times
on its way (scores, probabilities, their gradients, the result), each by 2^-9 and grown by scores up to 2.
"""


def attention(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, lengths: Sequence[int], parents: Sequence[int],
    scale: float, causal: bool, window: int | None,
) -> Tensor:  # fmt: skip
    """All pairs at once in float64 with one mask over [T, T]."""
    T, H, K = q_THD.shape[0], q_THD.shape[1], k_TKD.shape[1]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    parent = torch.tensor([*parents, -1])[segment] if T else torch.zeros(0, dtype=torch.int64)
    start = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    before = torch.tensor([lengths[p] if p >= 0 else 0 for p in parents])
    position = torch.arange(T) - start[segment] + before[segment]
    back = position[:, None] - position[None, :]
    same = segment[:, None] == segment[None, :]
    inherited = parent[:, None] == segment[None, :]
    mask = same | inherited
    if causal:
        mask &= back >= 0
    if window is not None:
        mask &= back < window
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q_THD, k_TKD, v_TKE))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return o[0].transpose(0, 1)


def rms_norm(x: Tensor, w: Tensor, *, eps: float, residual: Tensor | None, zero_centered: bool) -> Tensor:
    x, w = x.double(), w.double()
    x = x if residual is None else x + residual.double()
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), 1 + w if zero_centered else w, eps)


def rotate(x_THD: Tensor, angle_TR: Tensor, *, interleaved: bool) -> Tensor:
    """Rotation as a product of complex numbers."""
    R = angle_TR.shape[1]
    x = x_THD.double()
    turned, rest = x[..., : 2 * R], x[..., 2 * R :]
    if interleaved:
        pairs = torch.complex(turned[..., 0::2], turned[..., 1::2])
    else:
        pairs = torch.complex(turned[..., :R], turned[..., R:])
    pairs = pairs * torch.polar(torch.ones_like(angle_TR.double()), angle_TR.double())[:, None]
    parts = torch.view_as_real(pairs)
    joined = parts.flatten(-2) if interleaved else torch.cat([parts[..., 0], parts[..., 1]], -1)
    return torch.cat([joined, rest], -1)


def logprob(
    hidden_TC: Tensor, head_VC: Tensor, labels_T: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden_TC.double() @ head_VC.double().T / temperature
    chosen = torch.log_softmax(logits, -1).gather(1, labels_T[:, None])[:, 0]
    return chosen, torch.distributions.Categorical(logits=logits, validate_args=False).entropy()


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
