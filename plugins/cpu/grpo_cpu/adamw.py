"""AdamW through torch's fused CPU step, piece by piece, so that the scaled gradient and the copy in the
compute dtype are made while the piece is in cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE = 1 << 18
"""Elements of a piece: 4 MiB of parameter, gradient and moments."""


@torch.no_grad()
def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decays: Sequence[float], grad_scale: float, copies: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """See `grpo_core.ops.fused.AdamW`. Gradients stay as they are."""
    at_step = torch.tensor(float(step))
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, weight_decays, copies, strict=True)
    for param, grad, first, second, weight_decay, copy in rows:
        flat = [_flat(x) for x in (param, grad, first, second)]
        cast = None if copy is None else _flat(copy)
        for start in range(0, flat[0].numel(), PIECE):
            p, g, m, v = (x[start : start + PIECE] for x in flat)
            g = g if grad_scale == 1 else g * grad_scale
            torch._fused_adamw_(
                [p], [g], [m], [v], [], [at_step], lr=lr, beta1=beta1, beta2=beta2,
                weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
            )  # fmt: skip
            if cast is not None:
                cast[start : start + PIECE].copy_(p)


def _flat(x: Tensor) -> Tensor:
    """A view [numel]. Raises ValueError for a tensor that has none, which could not be stepped in place."""
    if not x.is_contiguous():
        raise ValueError(f"AdamW steps contiguous tensors in place, not one of strides {x.stride()}")
    return x.view(-1)
