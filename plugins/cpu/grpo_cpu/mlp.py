"""SwiGLU that keeps only its input; rounds once more than the reference, after SiLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """See `grpo_core.ops.fused.SwiGLU`."""
    result: Tensor = _SwiGLU.apply(gate_up)
    return result


def swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, without autograd."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(gate_up: Tensor, g_y: Tensor) -> Tensor:
    """With s = sigmoid(gate):  g_up = g gate s,  g_gate = g up s (1 + gate (1 - s))."""
    gate, up = gate_up.chunk(2, -1)
    g_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    g_gate, g_up = g_gate_up.chunk(2, -1)
    torch.mul(torch.nn.functional.silu(gate), g_y, out=g_up)
    g_gate.copy_(torch.ops.aten.silu_backward(g_y * up, gate))
    return g_gate_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return swiglu_backward(ctx.saved_tensors[0], grads[0])
