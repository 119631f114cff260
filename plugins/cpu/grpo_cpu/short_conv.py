"""short_conv.varlen and short_conv.step in torch: W shifted products, all segments at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import accumulate, bounds


def varlen(
    x_TC: Tensor, w_CW: Tensor, *, cu_seqlens: Tensor, initial_state_SCW: Tensor | None, final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.ConvVarlen`."""
    C, W = w_CW.shape
    ends = torch.tensor(bounds(cu_seqlens, x_TC.shape[0], common), dtype=torch.int64)
    lengths = ends.diff()
    S = lengths.numel()
    # W - 1 rows in front of every segment hold its initial state.
    at_T = torch.arange(x_TC.shape[0]) + torch.repeat_interleave(torch.arange(1, S + 1) * (W - 1), lengths)
    heads_SW = (ends[:-1] + torch.arange(S) * (W - 1))[:, None] + torch.arange(W - 1)
    inputs_UC = x_TC.new_zeros(x_TC.shape[0] + heads_SW.numel(), C).index_copy(0, at_T, x_TC)
    if initial_state_SCW is not None:
        before_SWC = initial_state_SCW.to(x_TC.dtype).mT
        inputs_UC = inputs_UC.index_copy(0, heads_SW.reshape(-1), before_SWC.reshape(-1, C))
    y_TC: Tensor = _Conv.apply(inputs_UC, w_CW, at_T)
    if not final_state:
        return y_TC, None
    tails_SW = heads_SW + lengths[:, None]
    return y_TC, inputs_UC[tails_SW].mT.contiguous()


class _Conv(torch.autograd.Function):
    """silu of the convolution at rows `at` of the inputs; rows before them are seen, not written."""

    @staticmethod
    def forward(ctx: Any, x_UC: Tensor, w_CW: Tensor, at_T: Tensor) -> Tensor:
        ctx.save_for_backward(x_UC, w_CW, at_T)
        raw_TC = _raw(x_UC, w_CW).index_select(0, at_T - w_CW.shape[1] + 1)
        return torch.nn.functional.silu(raw_TC, inplace=True).to(x_UC.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_UC, w_CW, at_T = ctx.saved_tensors
        C, W = w_CW.shape
        wide_UC = x_UC.to(accumulate(x_UC.dtype))
        raw = _raw(x_UC, w_CW)
        # Rows that reach over a segment's start hold a neighbour's values: only those of tokens are read.
        raw_TC = raw.index_select(0, at_T - W + 1)
        d_TC = torch.ops.aten.silu_backward(grads[0].to(raw.dtype), raw_TC)
        d_raw = torch.zeros_like(raw).index_copy_(0, at_T - W + 1, d_TC)
        rows = raw.shape[0]
        d_x, d_w = torch.zeros_like(wide_UC), wide_UC.new_empty(W, C)
        for i in range(W):
            d_x[i : i + rows].addcmul_(d_raw, w_CW[:, i].to(raw.dtype))
            torch.sum(d_raw * wide_UC[i : i + rows], 0, out=d_w[i])
        return d_x.to(x_UC.dtype), d_w.T.to(w_CW.dtype), None


def _raw(x_UC: Tensor, w_CW: Tensor) -> Tensor:
    """The convolution at every row that has W - 1 before it, [U - W + 1, C]."""
    W = w_CW.shape[1]
    acc = accumulate(x_UC.dtype)
    rows = max(0, x_UC.shape[0] - W + 1)
    wide_UC, w_WC = x_UC.to(acc), w_CW.to(acc).T.contiguous()
    y = wide_UC[:rows] * w_WC[0]
    for i in range(1, W):
        y.addcmul_(wide_UC[i : i + rows], w_WC[i])
    return y


def step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """See `grpo_core.ops.linear_attention.ConvStep`."""
    acc = accumulate(x_BC.dtype)
    inputs_BCW = torch.cat([state_NCW.index_select(0, slots).to(x_BC.dtype), x_BC[..., None]], -1)
    state_NCW.index_copy_(0, slots, inputs_BCW[..., 1:].to(state_NCW.dtype))
    y_BC = (inputs_BCW.to(acc) * w_CW.to(acc)).sum(-1)
    return torch.nn.functional.silu(y_BC).to(x_BC.dtype)
