"""gated_delta.* and short_conv.*: the step of decoding, taken token after token in training as well."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference import rowwise
from grpo_core.ops.reference.attention import accumulate, bounds

from . import delta, short_conv
from .consistent import borrowed


def _advance(
    state_nKDE: Tensor, q_nKD: Tensor, k_nKD: Tensor, v_nKE: Tensor, g_nK: Tensor, beta_nK: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of n sequences, all in the state's dtype: (new state, what q reads from it)."""
    n, K, D, E = state_nKDE.shape
    faded_nKDE = state_nKDE * torch.exp(g_nK.contiguous())[..., None, None]
    recalled_bE = torch.bmm(k_nKD.reshape(n * K, 1, D), faded_nKDE.view(n * K, D, E))
    change_nKE = (v_nKE - recalled_bE.view(n, K, E)) * beta_nK[..., None]
    new_nKDE = faded_nKDE + k_nKD[..., None] * change_nKE[..., None, :]
    read_bE = torch.bmm(q_nKD.reshape(n * K, 1, D), new_nKDE.view(n * K, D, E))
    return new_nKDE, read_bE.view(n, K, E)


def _wide_heads(x_THD: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    if heads % x_THD.shape[1]:
        raise ValueError(f"{heads} value heads cannot be shared out over {x_THD.shape[1]} key heads")
    return x_THD.to(dtype).repeat_interleave(heads // x_THD.shape[1], 1)


def chunk(
    q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor, g_TK: Tensor, beta_TK: Tensor, *, cu_seqlens: Tensor,
    scale: float, initial_state_SKDE: Tensor | None, final_state: bool, common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaChunk`."""
    ends = bounds(cu_seqlens, q_THD.shape[0], common)

    def exact(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        return _steps(ends, scale, state, *(x for x in inputs if x is not None))

    def smooth(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        *inputs, state = tensors
        o_TKE, last_SKDE = delta.chunk(
            *inputs, cu_seqlens=cu_seqlens, scale=scale, initial_state_SKDE=state, final_state=True
        )
        assert last_SKDE is not None
        return o_TKE, last_SKDE

    results = borrowed(exact, smooth, q_THD, k_THD, v_TKE, g_TK, beta_TK, initial_state_SKDE)
    return results[0], results[1] if final_state else None


def _steps(
    ends: list[int], scale: float, initial_SKDE: Tensor | None, q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor,
    g_TK: Tensor, beta_TK: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All segments side by side, the longest first, so that those still running are the first ones."""
    (K, E), D, acc = v_TKE.shape[1:], q_THD.shape[2], accumulate(v_TKE.dtype)
    q_TKD, k_TKD = (_wide_heads(x, K, acc) for x in (q_THD, k_THD))
    v, g, beta = v_TKE.to(acc), g_TK.to(acc), beta_TK.to(acc)
    starts_S, lengths_S = torch.tensor(ends[:-1], dtype=torch.int64), torch.tensor(ends).diff()
    order_S = lengths_S.argsort(descending=True, stable=True)
    if initial_SKDE is None:
        state_SKDE = torch.zeros(len(order_S), K, D, E, dtype=acc)
    else:
        state_SKDE = initial_SKDE.to(acc).index_select(0, order_S)
    starts_S, lengths_S = starts_S[order_S], lengths_S[order_S]
    o_TKE = torch.empty_like(v_TKE, memory_format=torch.contiguous_format)
    for t in range(int(lengths_S.max()) if len(order_S) else 0):
        running = int((lengths_S > t).sum())
        rows = starts_S[:running] + t
        state_SKDE[:running], read_nKE = _advance(
            state_SKDE[:running], *(x.index_select(0, rows) for x in (q_TKD, k_TKD, v, g, beta))
        )
        o_TKE[rows] = (scale * read_nKE).to(o_TKE.dtype)
    last_SKDE = torch.empty_like(state_SKDE)
    last_SKDE[order_S] = state_SKDE
    return o_TKE, last_SKDE


def step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaStep`."""
    acc = accumulate(v_BKE.dtype)
    q_BKD, k_BKD = (_wide_heads(x, v_BKE.shape[1], acc) for x in (q_BHD, k_BHD))
    new_BKDE, read_BKE = _advance(
        state_NKDE.index_select(0, slots).to(acc), q_BKD, k_BKD, v_BKE.to(acc), g_BK.to(acc), beta_BK.to(acc)
    )
    state_NKDE.index_copy_(0, slots, new_BKDE.to(state_NKDE.dtype))
    return (scale * read_BKE).to(v_BKE.dtype)


def _convolve(inputs: list[Tensor], w_CW: Tensor) -> Tensor:
    """silu(sum of inputs[i] w[:, i]) in float32, summed from the oldest on; each input is [T, C]."""
    acc = accumulate(w_CW.dtype)
    y_TC = inputs[0].to(acc) * w_CW[:, 0].to(acc)
    for i, x_TC in enumerate(inputs[1:], 1):
        y_TC = y_TC + x_TC.to(acc) * w_CW[:, i].to(acc)
    return rowwise.silu(y_TC).to(inputs[0].dtype)


def conv_varlen(
    x_TC: Tensor, w_CW: Tensor, *, cu_seqlens: Tensor, initial_state_SCW: Tensor | None, final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.ConvVarlen`."""
    ends = bounds(cu_seqlens, x_TC.shape[0], common)

    def exact(x_TC: Tensor, w_CW: Tensor, before_SCW: Tensor | None) -> tuple[Tensor, Tensor]:
        (C, W), outputs, windows = w_CW.shape, [x_TC.new_zeros(0, w_CW.shape[0])], []
        for segment in range(len(ends) - 1):
            length = ends[segment + 1] - ends[segment]
            before = x_TC.new_zeros(C, W - 1) if before_SCW is None else before_SCW[segment].to(x_TC.dtype)
            inputs_UC = torch.cat([before.T, x_TC[ends[segment] : ends[segment + 1]]])
            outputs.append(_convolve([inputs_UC[i : i + length] for i in range(W)], w_CW))
            windows.append(inputs_UC[length:].T)
        return torch.cat(outputs), torch.stack(windows) if windows else x_TC.new_zeros(0, C, W - 1)

    def smooth(x_TC: Tensor, w_CW: Tensor, before_SCW: Tensor | None) -> tuple[Tensor, Tensor]:
        y_TC, window_SCW = short_conv.varlen(
            x_TC, w_CW, cu_seqlens=cu_seqlens, initial_state_SCW=before_SCW, final_state=True
        )
        assert window_SCW is not None
        return y_TC, window_SCW

    results = borrowed(exact, smooth, x_TC, w_CW, initial_state_SCW)
    return results[0], results[1] if final_state else None


def conv_step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """See `grpo_core.ops.linear_attention.ConvStep`."""
    inputs_BCW = torch.cat([state_NCW.index_select(0, slots).to(x_BC.dtype), x_BC[..., None]], -1)
    state_NCW.index_copy_(0, slots, inputs_BCW[..., 1:].to(state_NCW.dtype))
    return _convolve(list(inputs_BCW.unbind(-1)), w_CW)
