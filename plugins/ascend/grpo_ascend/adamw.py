"""AdamW with `npu_apply_adam_w`, one fused kernel for each tensor, deterministic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_npu
from torch import Tensor


def adamw(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], *, step: int, lr: float, beta1: float, beta2: float, eps: float,
    weight_decays: Sequence[float], grad_scale: float, copies: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """See `grpo_core.ops.fused.AdamW`. The kernel multiplies the powers of the betas once more itself."""
    rows = zip(params, grads, exp_avgs, exp_avg_sqs, weight_decays, copies, strict=True)
    with torch.no_grad():
        for param, grad, first, second, weight_decay, copy in rows:
            if param.numel():
                if grad_scale != 1:
                    grad.mul_(grad_scale)
                torch_npu.npu_apply_adam_w(
                    beta1 ** (step - 1), beta2 ** (step - 1), lr, weight_decay, beta1, beta2, eps,
                    grad, None, False, False,
                    out=(param, first, second),
                )  # fmt: skip
            if copy is not None:
                copy.copy_(param)
