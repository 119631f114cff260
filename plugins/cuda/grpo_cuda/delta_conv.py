"""short_conv.varlen and short_conv.step in torch: W shifted products over all segments at once."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import accumulate, bounds

from .delta_plan import place
from .lengths import shared


def varlen(
    x_TC: Tensor, w_CW: Tensor, *, cu_seqlens: Tensor, initial_state_SCW: Tensor | None, final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.ConvVarlen`."""
    (T, C), W, acc = x_TC.shape, w_CW.shape[1], accumulate(x_TC.dtype)
    ends = bounds(cu_seqlens, T, common)
    rows_U, back_T, _ = _layout(ends, W, x_TC.device, common)
    if initial_state_SCW is None:
        inputs_UC = place(x_TC, rows_U.clamp_max(T), back_T[:T])
    else:
        inputs_UC = place(_with_states(x_TC, initial_state_SCW), rows_U, back_T)
    wide_UC, w_WC = inputs_UC.to(acc), w_CW.to(acc).t()
    lines = max(0, rows_U.shape[0] - W + 1)
    raw_LC = wide_UC.new_zeros(lines, C)
    for i in range(W):
        raw_LC = raw_LC + wide_UC[i : i + lines] * w_WC[i]
    # Lines that reach over the start of a segment hold a neighbour's values: only those of tokens are read.
    y_TC = silu(raw_LC.index_select(0, back_T[:T] - (W - 1))).to(x_TC.dtype)
    return y_TC, last_inputs(x_TC, initial_state_SCW, W, ends, common) if final_state else None


def last_inputs(
    x_TC: Tensor, initial_state_SCW: Tensor | None, W: int, ends: list[int], common: Common | None
) -> Tensor:
    """The last W - 1 inputs of each segment, [S, C, W - 1]."""
    T = x_TC.shape[0]
    rows_U, _, tails_SW = _layout(ends, W, x_TC.device, common)
    source_SW = rows_U[tails_SW]
    if initial_state_SCW is None:
        found = torch.cat([x_TC, x_TC.new_zeros(1, x_TC.shape[1])])[source_SW.clamp_max(T)]
    else:
        found = _with_states(x_TC, initial_state_SCW)[source_SW]
    return found.mT.contiguous()


def _with_states(x_TC: Tensor, state_SCW: Tensor) -> Tensor:
    return torch.cat([x_TC, state_SCW.to(x_TC.dtype).mT.reshape(-1, x_TC.shape[1])])


def _layout(
    ends: list[int], W: int, device: torch.device, common: Common | None
) -> tuple[Tensor, Tensor, Tensor]:
    return shared(common, ("conv", W), lambda: _rows(ends, W, device))


def _rows(ends: list[int], W: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Each segment behind the W - 1 inputs before it: which row of [tokens | states] lies where [U], where
    each of those rows lies [T + S (W - 1)], and where the last W - 1 inputs of each segment are [S, W - 1].
    """
    T, S, before = ends[-1], len(ends) - 1, W - 1
    rows: list[int] = []
    tails: list[list[int]] = []
    for segment, (start, end) in enumerate(pairwise(ends)):
        rows += range(T + segment * before, T + (segment + 1) * before)
        rows += range(start, end)
        tails.append(list(range(len(rows) - before, len(rows))))
    rows_U = torch.tensor(rows, dtype=torch.int64)
    back = torch.empty_like(rows_U)
    back[rows_U] = torch.arange(rows_U.shape[0])
    tails_SW = torch.tensor(tails, dtype=torch.int64).view(S, before)
    return rows_U.to(device), back.to(device), tails_SW.to(device)


def step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """See `grpo_core.ops.linear_attention.ConvStep`."""
    acc = accumulate(x_BC.dtype)
    inputs_BCW = torch.cat([state_NCW.index_select(0, slots).to(x_BC.dtype), x_BC[..., None]], -1)
    state_NCW.index_copy_(0, slots, inputs_BCW[..., 1:].to(state_NCW.dtype))
    return silu((inputs_BCW.to(acc) * w_CW.to(acc)).sum(-1)).to(x_BC.dtype)
