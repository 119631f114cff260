"""A mixture of experts with our Triton kernels: grouped products for any sizes, and gathered sums.

Which tile of rows belongs to which expert is computed on the device from the counts: the host never waits.
Operations and memory: forward 6 C F a row and the weights of the experts that have rows; backward twice that.
Gradients of weights go into float32 main gradients from the float32 sum, unrounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from grpo_core.ops.reference.moe import Sorted

from .moe import combine_with, dispatch_with
from .moe_products import Products, run_experts
from .moe_triton_kernels import rows_kernel, slopes_kernel, weigh_kernel, weights_kernel
from .triton_blocks import ProductTile, power_of_two, product_tile, swiglu_tile
from .triton_swiglu import swiglu, swiglu_backward_kernel

LEAST_ROWS = 16
"""Of a tile: the smallest that tensor cores take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which rows each program of a product has; int32, on the device."""

    ends_X: Tensor
    expert_M: Tensor
    """The number of experts where there is no work left."""
    first_M: Tensor
    last_M: Tensor
    rows: int
    """Of a tile."""


def schedule(ends_X: Tensor, rows: int, tile_rows: int) -> Schedule:
    """Tiles of at most `tile_rows` rows of one expert; smaller where experts have few on average."""
    X = ends_X.shape[0]
    size = min(tile_rows, max(LEAST_ROWS, power_of_two(rows // X)))
    starts_X = torch.cat([ends_X.new_zeros(1), ends_X[:-1]])
    tiles_X = ((ends_X - starts_X + size - 1) // size).cumsum(0, dtype=torch.int32)
    # As many as there can be: a partial tile for each expert beside the full ones.
    at_M = torch.arange(rows // size + X, dtype=torch.int32, device=ends_X.device)
    expert_M = torch.searchsorted(tiles_X, at_M, right=True, out_int32=True)
    of_M = expert_M.clamp_max(X - 1)
    before_M = torch.cat([tiles_X.new_zeros(1), tiles_X[:-1]])[of_M]
    return Schedule(
        ends_X=ends_X,
        expert_M=expert_M,
        first_M=starts_X[of_M] + (at_M - before_M) * size,
        last_M=ends_X[of_M],
        rows=size,
    )


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.moe.MoeExperts`. Raises ValueError for counts of another number of experts."""
    if counts_X.shape != gate_up_XGC.shape[:1]:
        raise ValueError(f"counts of {counts_X.numel()} experts for weights of {gate_up_XGC.shape[0]}")
    plan = schedule(counts_X.cumsum(0, dtype=torch.int32), rows_RC.shape[0], _tile(rows_RC).rows)
    return run_experts(
        PRODUCTS, rows_RC, gate_up_XGC, down_XCF, plan, main_grad_gate_up_XGC, main_grad_down_XCF
    )


def _tile(x: Tensor) -> ProductTile:
    return product_tile(str(x.dtype).removeprefix("torch."))


@torch.no_grad()
def _by_rows(x_RK: Tensor, weight_XKN: Tensor, plan: Schedule) -> Tensor:
    (R, K), (X, _, N), tile = x_RK.shape, weight_XKN.shape, _tile(x_RK)
    y_RN = x_RK.new_empty(R, N)
    rows_kernel[(plan.expert_M.shape[0], triton.cdiv(N, tile.columns))](
        x_RK, weight_XKN, y_RN, plan.expert_M, plan.first_M, plan.last_M, X, N, K, *x_RK.stride(),
        *weight_XKN.stride(), ROWS=plan.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_RN


@torch.no_grad()
def _of_weights(g_RN: Tensor, x_RK: Tensor, plan: Schedule) -> Tensor:
    out_XNK = g_RN.new_empty(plan.ends_X.shape[0], g_RN.shape[1], x_RK.shape[1])
    _weights(out_XNK, g_RN, x_RK, plan.ends_X, add=False)
    return out_XNK


@torch.no_grad()
def _add_to_main(main_XNK: Tensor, g_RN: Tensor, x_RK: Tensor, plan: Schedule) -> None:
    add_weight_gradient(main_XNK, g_RN, x_RK, plan.ends_X)


@torch.no_grad()
def add_weight_gradient(main_XNK: Tensor, g_RN: Tensor, x_RK: Tensor, ends_X: Tensor) -> None:
    """main[x] += g^T x over the rows of expert x, in float32. `ends_X` int32: their last rows plus 1."""
    _weights(main_XNK, g_RN, x_RK, ends_X, add=True)


@torch.no_grad()
def _weights(out_XNK: Tensor, g_RN: Tensor, x_RK: Tensor, ends_X: Tensor, *, add: bool) -> None:
    (X, N, K), tile = out_XNK.shape, _tile(x_RK)
    weights_kernel[(triton.cdiv(N, tile.rows), triton.cdiv(K, tile.columns), X)](
        g_RN, x_RK, out_XNK, ends_X, N, K, *g_RN.stride(), *x_RK.stride(), out_XNK.stride(0),
        out_XNK.stride(1), ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, ADD=add,
        PRECISION=tile.precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@torch.no_grad()
def _swiglu_backward(gate_up_RG: Tensor, g_RF: Tensor) -> Tensor:
    (R, F), tile = g_RF.shape, swiglu_tile(g_RF.shape[1])
    g_gate_up_RG = torch.empty_like(gate_up_RG)
    swiglu_backward_kernel[(triton.cdiv(R, tile.rows), triton.cdiv(F, tile.columns))](
        g_RF, gate_up_RG, g_gate_up_RG, R, F, gate_up_RG.stride(0), ROWS=tile.rows, COLUMNS=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip
    return g_gate_up_RG


PRODUCTS: Products[Schedule] = Products(
    by_rows=_by_rows, of_weights=_of_weights, add_to_main=_add_to_main, swiglu=swiglu,
    swiglu_backward=_swiglu_backward,
)  # fmt: skip


def dispatch(x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any) -> tuple[Tensor, Tensor, Sorted]:
    """See `grpo_core.ops.moe.MoeDispatch`, as in `moe`; gradients are gathered by a kernel."""
    return dispatch_with(_weigh, x_TC, ids_Tk, num_experts, group)


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Sorted) -> Tensor:
    """See `grpo_core.ops.moe.MoeCombine`."""
    return combine_with(_weigh, _slopes, rows_RC, weights_Tk, record)


def _columns(features: int) -> int:
    return min(1024, power_of_two(features))


@torch.no_grad()
def _weigh(rows_NC: Tensor, weights_Tk: Tensor | None, places_Tk: Tensor) -> Tensor:
    rows_NC, (T, k), C = rows_NC.contiguous(), places_Tk.shape, rows_NC.shape[1]
    y_TC = rows_NC.new_empty(T, C)
    if T:
        columns = _columns(C)
        # Without weights, anything that is a tensor takes their place.
        weights = rows_NC if weights_Tk is None else weights_Tk.contiguous()
        weigh_kernel[(T, triton.cdiv(C, columns))](
            rows_NC, weights, places_Tk.contiguous(), y_TC, C, k, WEIGHTED=weights_Tk is not None,
            COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return y_TC


@torch.no_grad()
def _slopes(
    g_TC: Tensor, rows_NC: Tensor, weights_Tk: Tensor, order_N: Tensor, *, of_rows: bool, of_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows_NC, (N, C) = rows_NC.contiguous(), rows_NC.shape
    g_rows_NC = torch.empty_like(rows_NC)
    g_weights_N = torch.empty(N, dtype=torch.float32, device=rows_NC.device)
    if N:
        slopes_kernel[(N,)](
            g_TC.contiguous(), rows_NC, weights_Tk.contiguous(), order_N, g_rows_NC, g_weights_N, C,
            weights_Tk.shape[1], OF_ROWS=of_rows, OF_WEIGHTS=of_weights, COLUMNS=_columns(C), num_warps=4,
        )  # fmt: skip
    return g_rows_NC if of_rows else None, g_weights_N if of_weights else None
