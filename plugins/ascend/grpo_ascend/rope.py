"""Rotary embedding with `npu_rotary_mul`, which autograd knows."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor


def rope_apply(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """See `grpo_core.ops.fused.RopeApply`; turned in float32, as the contract says."""
    if interleaved:
        cos, sin = (x.repeat_interleave(2, -1)[None, :, None] for x in (cos_TR, sin_TR))
    else:
        cos, sin = (torch.cat([x, x], -1)[None, :, None] for x in (cos_TR, sin_TR))
    return _turn(q_THD, cos, sin, interleaved), _turn(k_TKD, cos, sin, interleaved)


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Layout BSND with a batch of one; cos and sin float32 [1, T, 1, 2R]."""
    if not x_THD.numel():
        return x_THD
    rotary = cos.shape[-1]
    turned, rest = x_THD[..., :rotary], x_THD[..., rotary:]
    mode = "interleave" if interleaved else "half"
    y = torch_npu.npu_rotary_mul(turned.float().unsqueeze(0), cos, sin, mode).squeeze(0).to(x_THD.dtype)
    return y if not rest.shape[-1] else torch.cat([y, rest], -1)
