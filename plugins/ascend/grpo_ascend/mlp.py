"""SwiGLU with `npu_swiglu`, which autograd knows: its first half is the gate, as the contract has it."""

from __future__ import annotations

import torch_npu
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """See `grpo_core.ops.fused.SwiGLU`."""
    if not gate_up.numel():
        return gate_up[..., : gate_up.shape[-1] // 2]
    y: Tensor = torch_npu.npu_swiglu(gate_up, dim=-1)
    return y
