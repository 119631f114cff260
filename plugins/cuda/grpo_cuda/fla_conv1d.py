"""short_conv.step with causal-conv1d: windows of W - 1 inputs, updated in place in the slots they are in."""

from __future__ import annotations

import torch
from causal_conv1d import causal_conv1d_update
from torch import Tensor


def step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """See `grpo_core.ops.linear_attention.ConvStep`."""
    if not x_BC.shape[0]:
        return x_BC
    y_BC: Tensor = causal_conv1d_update(
        x_BC,
        state_NCW,
        w_CW,
        activation="silu",
        conv_state_indices=slots.to(torch.int32),
    )
    return y_BC
