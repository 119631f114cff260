"""The gated delta rule and the short convolution in float64, from the papers' formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu


def delta_rule(
    q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor, g_TK: Tensor, beta_TK: Tensor, state_SKDE: Tensor | None,
    lengths: Sequence[int], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Equation 10 of arXiv 2412.06464, token by token; outputs and the states after each segment.

    There the state is [E, D] and a step multiplies it by a matrix:
    S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t.
    """
    q, k, v, g, beta = (x.double() for x in (q_THD, k_THD, v_TKE, g_TK, beta_TK))
    (_, H, D), (_, K, E) = q.shape, v.shape
    heads = torch.arange(K) // (K // H)
    q, k = q[:, heads], k[:, heads]
    eye = torch.eye(D, dtype=torch.float64)
    # Unbound, because the gradient of each index into a tensor is as large as all of it.
    q_t, k_t, v_t, decay_t, beta_t = (x.unbind(0) for x in (q, k, v, g.exp(), beta))
    # The zeros keep inputs without tokens in the graph.
    nothing = sum(x.sum() for x in (q, k, v, g, beta)) * 0
    outputs = [v.new_zeros(0, K, E)]
    states, at = [v.new_zeros(0, K, D, E)], 0
    for segment, length in enumerate(lengths):
        state = torch.zeros(K, E, D, dtype=torch.float64)
        if state_SKDE is not None:
            state = state_SKDE[segment].double().transpose(1, 2)
        for t in range(at, at + length):
            b, key = beta_t[t][:, None, None], k_t[t]
            forget = decay_t[t][:, None, None] * (eye - b * key[:, :, None] * key[:, None, :])
            state = state @ forget + b * v_t[t][:, :, None] * key[:, None, :]
            outputs.append(scale * (state @ q_t[t][:, :, None])[..., 0][None])
        at += length
        states.append(state.transpose(1, 2)[None] + nothing)
    return torch.cat(outputs) + nothing, torch.cat(states)


def conv(
    x_TC: Tensor, w_CW: Tensor, state_SCW: Tensor | None, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """silu(conv1d) in float64, one segment after the other; outputs and the last inputs of each."""
    C, W = w_CW.shape
    nothing = (x_TC.double().sum() + w_CW.double().sum()) * 0
    outputs, states, at = [torch.zeros(0, C, dtype=torch.float64)], [], 0
    for segment, length in enumerate(lengths):
        before = torch.zeros(C, W - 1).double() if state_SCW is None else state_SCW[segment].double()
        seen_CU = torch.cat([before, x_TC[at : at + length].double().T], 1)
        at += length
        if length:
            outputs.append(silu(conv1d(seen_CU[None], w_CW.double()[:, None], groups=C))[0].T)
        states.append(seen_CU[:, seen_CU.shape[1] - (W - 1) :])
    last = torch.stack(states) if states else torch.zeros(0, C, W - 1).double()
    return torch.cat(outputs) + nothing, last
