"""A mixture of experts with Transformer Engine: its permute and unpermute by a mask, and its GroupedLinear.

The mask form is the one that adds up in float32 (the index form adds in the rows' dtype). GroupedLinear owns
its weights; here it is a shell without memory, and the contract's weights are lent to it for one call. Its
splits are numbers on the host, so each layer waits once for the counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformer_engine.pytorch import GroupedLinear, moe_permute, moe_unpermute

from grpo_core.ops.reference.expert_parallel import Exchange, plan_exchange
from grpo_core.ops.reference.fused import swiglu

from .moe import require
from .moe_products import swiglu_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class Permuted:
    """What `combine` needs to undo a dispatch."""

    ids_Tk: Tensor
    row_id_map: Tensor
    """The vendor's own."""
    num_experts: int
    exchange: Exchange | None


def dispatch(
    x_TC: Tensor, ids_Tk: Tensor, *, num_experts: int, group: Any
) -> tuple[Tensor, Tensor, Permuted]:
    """See `grpo_core.ops.moe.MoeDispatch`. Raises ValueError for experts that cannot be shared out evenly
    over the group; for ids that are out of range or repeated as `require` does."""
    T, k = ids_Tk.shape
    outside = (ids_Tk < 0) | (ids_Tk >= num_experts)
    require(~outside.any(), f"an expert id outside of {num_experts} experts")
    mask_TX = torch.zeros(T, num_experts, dtype=torch.int32, device=ids_Tk.device).scatter_(1, ids_Tk, 1)
    require(mask_TX.sum() == ids_Tk.numel(), "an expert id twice among those of a token")
    counts_X = mask_TX.sum(0)
    if T:
        rows_NC, row_id_map = moe_permute(x_TC, mask_TX, num_out_tokens=T * k, map_type="mask")
    else:
        rows_NC, row_id_map = x_TC, mask_TX
    exchange = None if group is None else plan_exchange(counts_X, group)
    record = Permuted(ids_Tk=ids_Tk, row_id_map=row_id_map, num_experts=num_experts, exchange=exchange)
    if exchange is None:
        return rows_NC, counts_X, record
    return exchange.there(rows_NC), exchange.counts_X, record


def combine(rows_RC: Tensor, weights_Tk: Tensor, record: Permuted) -> Tensor:
    """See `grpo_core.ops.moe.MoeCombine`. Raises TypeError for the record of another dispatch."""
    if not isinstance(record, Permuted):
        raise TypeError(f"the record of Transformer Engine's dispatch is wanted, not {type(record).__name__}")
    rows_NC = rows_RC if record.exchange is None else record.exchange.back(rows_RC)
    T = weights_Tk.shape[0]
    if not T:
        # Nothing to add up; the weights stay in the graph.
        return rows_NC + weights_Tk.sum().to(rows_NC.dtype)
    probs_TX = weights_Tk.new_zeros(T, record.num_experts).scatter(1, record.ids_Tk, weights_Tk)
    y_TC: Tensor = moe_unpermute(
        rows_NC,
        record.row_id_map,
        merging_probs=probs_TX,
        restore_shape=torch.Size((T, rows_NC.shape[1])),
        map_type="mask",
    )
    return y_TC


def experts(
    rows_RC: Tensor, gate_up_XGC: Tensor, down_XCF: Tensor, counts_X: Tensor, *,
    main_grad_gate_up_XGC: Tensor | None = None, main_grad_down_XCF: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.moe.MoeExperts`. Raises ValueError for counts that do not add up to the rows."""
    counts = counts_X.tolist()
    if len(counts) != gate_up_XGC.shape[0] or sum(counts) != rows_RC.shape[0] or min(counts) < 0:
        raise ValueError(f"{rows_RC.shape[0]} rows of {gate_up_XGC.shape[0]} experts, counts {counts[:8]}...")
    if not counts or not rows_RC.shape[0]:
        return _nothing(rows_RC, gate_up_XGC, down_XCF, main_grad_gate_up_XGC, main_grad_down_XCF)
    hidden_RG = _linear(rows_RC, gate_up_XGC, counts, main_grad_gate_up_XGC)
    apply: Any = _Swiglu.apply
    return _linear(apply(hidden_RG), down_XCF, counts, main_grad_down_XCF)


def _linear(rows_RK: Tensor, weight_XNK: Tensor, counts: list[int], main_XNK: Tensor | None) -> Tensor:
    X, N, K = weight_XNK.shape
    fused = main_XNK is not None and weight_XNK.requires_grad
    shell = _shell(X, K, N, weight_XNK.dtype, fused)
    weights = _leaves(weight_XNK, main_XNK) if main_XNK is not None and fused else weight_XNK.unbind(0)
    lent = {f"weight{x}": weight for x, weight in enumerate(weights)}
    y_RN: Tensor = functional_call(shell, lent, (rows_RK.contiguous(), counts))
    return y_RN


def _leaves(weight_XNK: Tensor, main_XNK: Tensor) -> tuple[Any, ...]:
    """The experts' weights as leaves with a `main_grad`: the vendor adds to it and gives autograd nothing."""
    leaves: tuple[Any, ...] = tuple(weight.requires_grad_() for weight in weight_XNK.detach().unbind(0))
    for leaf, main in zip(leaves, main_XNK.unbind(0), strict=True):
        leaf.main_grad = main
    return leaves


@lru_cache(maxsize=32)
def _shell(num_gemms: int, in_features: int, out_features: int, dtype: torch.dtype, fused: bool) -> Any:
    """A GroupedLinear whose own weights take no memory."""
    return GroupedLinear(
        num_gemms, in_features, out_features, bias=False, params_dtype=dtype, device="meta",
        fuse_wgrad_accumulation=fused,
    )  # fmt: skip


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_RG: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_RG)
        return swiglu(gate_up_RG)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return swiglu_backward(ctx.saved_tensors[0], grads[0])


def _nothing(rows_RC: Tensor, *weights: Tensor | None) -> Tensor:
    """No rows: gradients of zeros for weights that have no main gradient."""
    gate_up_XGC, down_XCF, main_gate_up_XGC, main_down_XCF = weights
    assert gate_up_XGC is not None and down_XCF is not None
    y_RC = rows_RC.clone()
    for weight, main in ((gate_up_XGC, main_gate_up_XGC), (down_XCF, main_down_XCF)):
        if main is None:
            # A sum over no elements keeps the weight in the graph.
            y_RC = y_RC + weight.flatten()[:0].sum()
    return y_RC
