"""moe.experts on torch's grouped product: one kernel for all experts, counts stay on the device.

`torch.nn.functional.grouped_mm` has CUTLASS kernels for bfloat16 on compute capabilities 9.0 and 10.0; on
others it loops and waits for the host. It wants rows of a multiple of 16 bytes and writes the dtype that it
reads, so gradients that are added to float32 main gradients are our Triton kernel's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from grpo_core.ops.reference.fused import swiglu

from .moe_products import Products, run_experts, swiglu_backward


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.moe.MoeExperts`. Raises ValueError for counts of another number of experts."""
    if counts_X.shape != gate_up_XGC.shape[:1]:
        raise ValueError(f"counts of {counts_X.numel()} experts for weights of {gate_up_XGC.shape[0]}")
    ends_X = counts_X.cumsum(0, dtype=torch.int32)
    return run_experts(
        GROUPED, aligned(rows_RC), aligned(gate_up_XGC), aligned(down_XCF), ends_X, main_grad_gate_up_XGC,
        main_grad_down_XCF,
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """x, copied where its strides are not the kernel's."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


@torch.no_grad()
def _by_rows(x_RK: Tensor, weight_XKN: Tensor, ends_X: Tensor) -> Tensor:
    return grouped_mm(x_RK, weight_XKN, offs=ends_X)


@torch.no_grad()
def _of_weights(g_RN: Tensor, x_RK: Tensor, ends_X: Tensor) -> Tensor:
    g_XNK = grouped_mm(g_RN.t(), x_RK, offs=ends_X)
    # What the kernel leaves for a sum of no terms is nowhere said.
    empty_X = ends_X == torch.cat([ends_X.new_zeros(1), ends_X[:-1]])
    return g_XNK.masked_fill_(empty_X[:, None, None], 0)


@torch.no_grad()
def _add_to_main(main_XNK: Tensor, g_RN: Tensor, x_RK: Tensor, ends_X: Tensor) -> None:
    from .moe_triton import add_weight_gradient

    add_weight_gradient(main_XNK, g_RN, x_RK, ends_X)


GROUPED: Products[Tensor] = Products(
    by_rows=_by_rows, of_weights=_of_weights, add_to_main=_add_to_main, swiglu=swiglu,
    swiglu_backward=swiglu_backward,
)  # fmt: skip
