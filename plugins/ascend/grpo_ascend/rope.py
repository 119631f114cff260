"""Rotary embedding with `npu_rotary_mul`, which autograd knows."""

from __future__ import annotations

import torch
import torch_npu
from torch import Tensor

from grpo_core.ops.common import Common


def rope_apply(
    q_THD: Tensor, k_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, interleaved: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.RopeApply`; turned in float32, as the contract says."""

    def make() -> tuple[Tensor, Tensor]:
        return _both(cos_TR, interleaved), _both(sin_TR, interleaved)

    # The tables outlive the pass, so that their ids stay theirs.
    key = ("ascend.turn", id(cos_TR), id(sin_TR), interleaved)
    cos, sin = make() if common is None else common.once(key, make)
    return _turn(q_THD, cos, sin, interleaved), _turn(k_TKD, cos, sin, interleaved)


def _both(x_TR: Tensor, interleaved: bool) -> Tensor:
    """An angle's number for both members of its pair, [1, T, 1, 2R]."""
    x_TW = x_TR.repeat_interleave(2, -1) if interleaved else torch.cat([x_TR, x_TR], -1)
    return x_TW[None, :, None]


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Layout BSND with a batch of one; cos and sin float32 [1, T, 1, 2R]."""
    if not x_THD.numel():
        return x_THD
    rotary = cos.shape[-1]
    turned, rest = x_THD[..., :rotary], x_THD[..., rotary:]
    mode = "interleave" if interleaved else "half"
    y = torch_npu.npu_rotary_mul(turned.float().unsqueeze(0), cos, sin, mode).squeeze(0).to(x_THD.dtype)
    return y if not rest.shape[-1] else torch.cat([y, rest], -1)
