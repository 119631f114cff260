"""AdamW with torch's fused multi-tensor kernel: a few launches for all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decays: Sequence[float], grad_scale: float, copies: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """See `grpo_core.ops.fused.AdamW`. Gradients are scaled in place: torch's own scale divides instead.

    Memory traffic: 28 bytes a parameter, 6 for a bfloat16 copy, 8 where `grad_scale` is not 1.
    """
    if grad_scale != 1:
        torch._foreach_mul_(list(grads), grad_scale)
    by_decay: dict[float, list[int]] = {}
    for i, weight_decay in enumerate(weight_decays):
        by_decay.setdefault(weight_decay, []).append(i)
    for weight_decay, places in by_decay.items():
        at_step = torch.full((), float(step), device=params[places[0]].device)
        torch._fused_adamw_(
            [params[i] for i in places], [grads[i] for i in places], [exp_avgs[i] for i in places],
            [exp_avg_sqs[i] for i in places], [], [at_step] * len(places), lr=lr, beta1=beta1, beta2=beta2,
            weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    pairs = [(copy, param) for copy, param in zip(copies, params, strict=True) if copy is not None]
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [param for _, param in pairs])
