"""gated_delta.step and short_conv.step of the C++ pack, bfloat16 and float32: one pass over each state."""

from __future__ import annotations

from torch import Tensor

from .native import load

_ops = load()


def delta_step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """gated_delta.step. Raises IndexError for a slot that the states do not have."""
    return _ops.delta_step(q_BHD, k_BHD, v_BKE, g_BK, beta_BK, state_NKDE, slots, scale)


def conv_step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """short_conv.step. Raises IndexError for a slot that the windows do not have."""
    return _ops.conv_step(x_BC, w_CW, state_NCW, slots)
