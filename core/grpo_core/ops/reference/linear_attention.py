"""The gated delta rule and the short convolution in plain torch, one token after the other.

The specification of `gated_delta.*` and `short_conv.*` on any device; computed in float32 (float64 for
float64 inputs).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..common import Common
from .attention import accumulate, bounds


def _advance(
    state_BKDE: Tensor, q_BKD: Tensor, k_BKD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of equation 10 of arXiv 2412.06464: (the new state, what q reads from it)."""
    decayed_BKDE = g_BK.exp()[..., None, None] * state_BKDE
    recalled_BKE = torch.einsum("bkde,bkd->bke", decayed_BKDE, k_BKD)
    change_BKE = beta_BK[..., None] * (v_BKE - recalled_BKE)
    new_BKDE = decayed_BKDE + k_BKD[..., :, None] * change_BKE[..., None, :]
    return new_BKDE, torch.einsum("bkde,bkd->bke", new_BKDE, q_BKD)


def _spread_heads(x_THD: Tensor, heads: int) -> Tensor:
    """Key heads repeated for the value heads that read them. Raises ValueError where they do not divide."""
    if heads % x_THD.shape[1]:
        raise ValueError(f"{heads} value heads cannot be shared out over {x_THD.shape[1]} key heads")
    return x_THD.repeat_interleave(heads // x_THD.shape[1], 1)


def delta_chunk(
    q_THD: Tensor,
    k_THD: Tensor,
    v_TKE: Tensor,
    g_TK: Tensor,
    beta_TK: Tensor,
    *,
    cu_seqlens: Tensor,
    scale: float,
    initial_state_SKDE: Tensor | None,
    final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reference of `gated_delta.chunk`: the recurrence, token by token."""
    acc = accumulate(v_TKE.dtype)
    ends = bounds(cu_seqlens, q_THD.shape[0], common)
    K, E = v_TKE.shape[1:]
    q_TKD, k_TKD = (_spread_heads(x, K).to(acc) for x in (q_THD, k_THD))
    v, g, beta = v_TKE.to(acc), g_TK.to(acc), beta_TK.to(acc)
    outputs = [v.new_zeros(0, K, E)]
    states = [v.new_zeros(0, K, q_THD.shape[2], E)]
    for segment, (start, end) in enumerate(pairwise(ends)):
        if initial_state_SKDE is None:
            state = v.new_zeros(1, K, q_THD.shape[2], E)
        else:
            state = initial_state_SKDE[segment : segment + 1].to(acc)
        for t in range(start, end):
            at = slice(t, t + 1)
            state, read_1KE = _advance(state, q_TKD[at], k_TKD[at], v[at], g[at], beta[at])
            outputs.append(scale * read_1KE)
        states.append(state)
    return torch.cat(outputs).to(v_TKE.dtype), torch.cat(states) if final_state else None


def delta_step(
    q_BHD: Tensor,
    k_BHD: Tensor,
    v_BKE: Tensor,
    g_BK: Tensor,
    beta_BK: Tensor,
    *,
    state_NKDE: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    """Reference of `gated_delta.step`."""
    acc = accumulate(v_BKE.dtype)
    q_BKD, k_BKD = (_spread_heads(x, v_BKE.shape[1]).to(acc) for x in (q_BHD, k_BHD))
    state_BKDE, read_BKE = _advance(
        state_NKDE[slots].to(acc), q_BKD, k_BKD, v_BKE.to(acc), g_BK.to(acc), beta_BK.to(acc)
    )
    state_NKDE[slots] = state_BKDE.to(state_NKDE.dtype)
    return (scale * read_BKE).to(v_BKE.dtype)


def conv_varlen(
    x_TC: Tensor,
    w_CW: Tensor,
    *,
    cu_seqlens: Tensor,
    initial_state_SCW: Tensor | None,
    final_state: bool,
    common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Reference of `short_conv.varlen`."""
    acc = accumulate(x_TC.dtype)
    C, W = w_CW.shape
    outputs = [x_TC.new_zeros(0, C)]
    states = [x_TC.new_zeros(0, C, W - 1)]
    for segment, (start, end) in enumerate(pairwise(bounds(cu_seqlens, x_TC.shape[0], common))):
        if initial_state_SCW is None:
            before_UC = x_TC.new_zeros(W - 1, C)
        else:
            before_UC = initial_state_SCW[segment].to(x_TC.dtype).T
        inputs_UC = torch.cat([before_UC, x_TC[start:end]])
        length = end - start
        y_TC = x_TC.new_zeros(length, C, dtype=acc)
        for i in range(W):
            y_TC = y_TC + inputs_UC[i : i + length].to(acc) * w_CW[:, i].to(acc)
        outputs.append(silu(y_TC).to(x_TC.dtype))
        states.append(inputs_UC[length:].T[None])
    return torch.cat(outputs), torch.cat(states) if final_state else None


def conv_step(x_BC: Tensor, w_CW: Tensor, *, state_NCW: Tensor, slots: Tensor) -> Tensor:
    """Reference of `short_conv.step`."""
    acc = accumulate(x_BC.dtype)
    inputs_BCW = torch.cat([state_NCW[slots].to(x_BC.dtype), x_BC[..., None]], -1)
    state_NCW[slots] = inputs_BCW[..., 1:].to(state_NCW.dtype)
    return silu((inputs_BCW.to(acc) * w_CW.to(acc)).sum(-1)).to(x_BC.dtype)
