"""The experts' feed-forward and its gradients, over any set of grouped products.

With h = silu(gate) up (Shazeer 2020):  y = h down^T,  [gate | up] = x gate_up^T. Backward keeps x and
[gate | up]; h is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from grpo_core.ops.reference.attention import accumulate

CountsT = TypeVar("CountsT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Products(Generic[CountsT]):
    """Products over rows sorted by expert, none of them differentiable; counts in the form that they take."""

    by_rows: Callable[[Tensor, Tensor, CountsT], Tensor]
    """(x_RK, weight_XKN, counts) -> rows of expert x times weight[x], [R, N]."""
    of_weights: Callable[[Tensor, Tensor, CountsT], Tensor]
    """(g_RN, x_RK, counts) -> g^T x of each expert's rows, [X, N, K]; zeros without rows."""
    add_to_main: Callable[[Tensor, Tensor, Tensor, CountsT], None]
    """(main_XNK, g_RN, x_RK, counts): the same, added to a float32 tensor without rounding it first."""
    swiglu: Callable[[Tensor], Tensor]
    """gate_up_RG -> silu(gate) up, [R, F]."""
    swiglu_backward: Callable[[Tensor, Tensor], Tensor]
    """(gate_up_RG, g_RF) -> the gradient of gate_up."""


def swiglu_backward(gate_up_RG: Tensor, g_RF: Tensor) -> Tensor:
    """The gradient of SwiGLU's input, in float32 or wider, rounded once."""
    wide = accumulate(gate_up_RG.dtype)
    gate, up = gate_up_RG.to(wide).chunk(2, -1)
    g = g_RF.to(wide)
    g_gate = torch.ops.aten.silu_backward(g * up, gate)
    return torch.cat([g_gate, g * torch.nn.functional.silu(gate)], -1).to(gate_up_RG.dtype)


def run_experts(
    products: Products[CountsT], rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts: CountsT,
    main_grad_gate_up_XGC: Tensor | None, main_grad_down_XCF: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.moe.MoeExperts`."""
    mains = main_grad_gate_up_XGC, main_grad_down_XCF
    y_RC: Tensor = _Experts.apply(rows_RC, gate_up_XGC, down_XCF, products, counts, mains)
    return y_RC


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, products: Products[Any],
        counts: Any, mains: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:  # fmt: skip
        ctx.products, ctx.counts, ctx.mains = products, counts, mains
        if not rows_RC.shape[0]:
            ctx.save_for_backward(rows_RC, gate_up_XGC, down_XCF)
            return rows_RC.new_zeros(rows_RC.shape)
        gate_up_RG = products.by_rows(rows_RC, gate_up_XGC.mT, counts)
        ctx.save_for_backward(rows_RC, gate_up_XGC, down_XCF, gate_up_RG)
        return products.by_rows(products.swiglu(gate_up_RG), down_XCF.mT, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 3:
            return _nothing(ctx)
        rows_RC, gate_up_XGC, down_XCF, gate_up_RG = ctx.saved_tensors
        need_rows, need_gate_up, need_down, *_ = ctx.needs_input_grad
        products, counts = ctx.products, ctx.counts
        main_gate_up_XGC, main_down_XCF = ctx.mains
        g_RC = grads[0].contiguous()
        g_down_XCF = g_gate_up_XGC = g_rows_RC = None
        if need_down:
            g_down_XCF = _gradient(products, g_RC, products.swiglu(gate_up_RG), counts, main_down_XCF)
        if need_rows or need_gate_up:
            g_gate_up_RG = products.swiglu_backward(gate_up_RG, products.by_rows(g_RC, down_XCF, counts))
            if need_gate_up:
                g_gate_up_XGC = _gradient(products, g_gate_up_RG, rows_RC, counts, main_gate_up_XGC)
            if need_rows:
                g_rows_RC = products.by_rows(g_gate_up_RG, gate_up_XGC, counts)
        return g_rows_RC, g_gate_up_XGC, g_down_XCF, None, None, None


def _gradient(
    products: Products[Any], g_RN: Tensor, x_RK: Tensor, counts: Any, main_XNK: Tensor | None
) -> Tensor | None:
    if main_XNK is None:
        return products.of_weights(g_RN, x_RK, counts)
    products.add_to_main(main_XNK, g_RN, x_RK, counts)
    return None


def _nothing(ctx: Any) -> tuple[Tensor | None, ...]:
    """Gradients of a layer without rows: zeros, and none for weights with a main gradient."""
    lent = (None, *ctx.mains)
    zeros = (
        torch.zeros_like(x) if need and main is None else None
        for x, need, main in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], lent, strict=True)
    )
    return *zeros, None, None, None
