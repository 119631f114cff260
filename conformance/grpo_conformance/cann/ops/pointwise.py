"""RMS norm, SwiGLU, rotary embedding and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, Table, one_dtype, require, unused, wide


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = input * rstd * gamma, and rstd = 1 / sqrt(mean(input^2) + epsilon), float32."""
    one_dtype("npu_rms_norm", (input, gamma), FLOATS)
    require(2 <= input.dim() <= 8, "npu_rms_norm", f"2 to 8 dimensions, not {input.dim()}")
    fits = input.shape[input.dim() - gamma.dim() :] == gamma.shape
    require(fits, "npu_rms_norm", f"gamma {list(gamma.shape)} does not end {list(input.shape)}")
    axes = tuple(range(input.dim() - gamma.dim(), input.dim()))
    x = wide(input)
    rstd = torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon)
    return (x * rstd * wide(gamma)).to(input.dtype), rstd


def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of input, in its dtype, and of gamma, in float32."""
    one_dtype("npu_rms_norm_backward", (dy, input, gamma), FLOATS)
    axes = tuple(range(input.dim() - gamma.dim(), input.dim()))
    rows = tuple(range(input.dim() - gamma.dim()))
    normed, up = wide(input) * rstd, wide(dy)
    inner = up * wide(gamma)
    dx = rstd * (inner - normed * (inner * normed).mean(axes, keepdim=True))
    return dx.to(input.dtype), (up * normed).sum(rows)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu of the first half times the second."""
    one_dtype("npu_swiglu", (input,), FLOATS)
    require(1 <= input.dim() <= 8, "npu_swiglu", f"1 to 8 dimensions, not {input.dim()}")
    require(input.shape[dim] % 2 == 0, "npu_swiglu", f"halves of {input.shape[dim]}")
    gate, up = wide(input).chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """The gradient of both halves."""
    one_dtype("npu_swiglu_backward", (grad_output, input), FLOATS)
    gate, up = wide(input).chunk(2, dim)
    dy, s = wide(grad_output), torch.sigmoid(gate)
    return torch.cat([dy * up * s * (1 + gate * (1 - s)), dy * gate * s], dim).to(input.dtype)


def _turned(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _back(x: Tensor, mode: str) -> Tensor:
    """The transpose of `_turned`."""
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([second, -first], -1)
    return torch.stack([x[..., 1::2], -x[..., ::2]], -1).flatten(-2)


def _check_rotary(op: str, input: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    require(mode in ("half", "interleave"), op, f"rotary_mode half or interleave, not {mode!r}")
    one_dtype(op, (input, r1, r2), FLOATS)
    require(input.dim() == r1.dim() == 4 and r1.shape == r2.shape, op, "four dimensions, r1 and r2 alike")
    *outer, dim = input.shape
    require(dim % 2 == 0 and dim < 896, op, f"a last dimension that is even and below 896, not {dim}")
    require(r1.shape[3] == dim, op, f"r1 of the last dimension {dim}, not {r1.shape[3]}")
    same = all(r in (1, x) for r, x in zip(r1.shape, input.shape, strict=True))
    require(same, op, f"r1 {list(r1.shape)} does not fit {list(input.shape)}")
    # The sequence is wherever r1 has more than one row, else where there is one alone.
    places = [i for i in range(3) if r1.shape[i] != 1] or [i for i in range(3) if outer[i] == 1]
    rest = [outer[i] for i in range(3) if i not in places[:1]]
    require(all(size < 1000 for size in rest), op, f"batch and heads below 1000, not {rest}")


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """r1 * input + r2 * turned(input)."""
    unused("npu_rotary_mul", rotate=rotate)
    _check_rotary("npu_rotary_mul", input, r1, r2, rotary_mode)
    x = wide(input)
    return (wide(r1) * x + wide(r2) * _turned(x, rotary_mode)).to(input.dtype)


def rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, r1 and r2."""
    _check_rotary("npu_rotary_mul_backward", input, r1, r2, rotary_mode)
    dy, x = wide(grad), wide(input)
    dx = wide(r1) * dy + _back(wide(r2) * dy, rotary_mode)
    g1, g2 = (dy * x).sum_to_size(r1.shape), (dy * _turned(x, rotary_mode)).sum_to_size(r2.shape)
    return dx.to(input.dtype), g1.to(r1.dtype), g2.to(r2.dtype)


def apply_adam_w(
    beta1_power: float, beta2_power: float, lr: float, weight_decay: float, beta1: float, beta2: float,
    epsilon: float, grad: Tensor, max_grad_norm: Tensor | None, amsgrad: bool | None,
    maximize: bool | None, *, out: list[Tensor],
) -> tuple[Any, ...]:  # fmt: skip
    """In place; the powers are those of the step before."""
    op = "npu_apply_adam_w"
    var, m, v = out
    one_dtype(op, (var, m, v, grad), FLOATS)
    require(var.shape == m.shape == v.shape == grad.shape, op, "one shape")
    require(1 <= var.dim() <= 8, op, f"1 to 8 dimensions, not {var.dim()}")
    require(bool(amsgrad) <= (max_grad_norm is not None), op, "amsgrad goes with max_grad_norm")
    unused(op, amsgrad=amsgrad or None)
    g = -wide(grad) if maximize else wide(grad)
    first, second = beta1 * wide(m) + (1 - beta1) * g, beta2 * wide(v) + (1 - beta2) * g * g
    root = (second / (1 - beta2_power * beta2)).sqrt() + epsilon
    step = lr * (first / (1 - beta1_power * beta1)) / root
    var.copy_(wide(var) - step - lr * weight_decay * wide(var))
    m.copy_(first)
    v.copy_(second)
    return tuple(out)


TABLE: Table = {
    "npu_rms_norm": rms_norm,
    "npu_rms_norm_backward": rms_norm_backward,
    "npu_swiglu": swiglu,
    "npu_swiglu_backward": swiglu_backward,
    "npu_rotary_mul": rotary_mul,
    "npu_rotary_mul_backward": rotary_mul_backward,
    "npu_apply_adam_w.out": apply_adam_w,
}
