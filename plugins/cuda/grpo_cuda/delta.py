"""gated_delta.chunk and gated_delta.step in torch, in float32, for what the fused kernels do not take.

A chunk of tokens is one set of matrix products (the UT transform of Yang et al. 2024, arXiv 2406.06484,
section 3.2, with the decay of arXiv 2412.06464, section 3.3). With c the cumulative log decay within a chunk,
D_ij = exp(c_i - c_j) for i >= j and M the state at its start:

    (I + tril(beta k k^T * D, -1)) [u | w] = [beta v | beta exp(c) k]
    new = u - w M,    o = scale (exp(c) q M + (q k^T * D) new),    M' = exp(c_last) M + (D_last k)^T new
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import accumulate, bounds

from .delta_plan import ChunkPlan, place, plan_chunks
from .lengths import shared


def chunk(
    q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor, g_TK: Tensor, beta_TK: Tensor, *, cu_seqlens: Tensor,
    scale: float, initial_state_SKDE: Tensor | None, final_state: bool, common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaChunk`. Raises ValueError for heads that do not divide."""
    T, K, E = v_TKE.shape
    rep, D = _groups(q_THD, K), q_THD.shape[2]
    ends = bounds(cu_seqlens, T, common)
    plan = shared(common, "delta chunks", lambda: plan_chunks(ends, v_TKE.device))
    acc = accumulate(v_TKE.dtype)
    if initial_state_SKDE is None:
        state_SKDE = v_TKE.new_zeros(len(ends) - 1, K, D, E, dtype=acc)
    else:
        state_SKDE = place(initial_state_SKDE.to(acc), plan.order, plan.ranks)
    q, k, v = (_chunks(x.to(acc), plan) for x in (q_THD * scale if T else q_THD, k_THD, v_TKE))
    # In float64: after a strong decay, float32 would lose the small differences of what follows.
    g, beta = (_chunks(x[..., None], plan)[..., 0] for x in (g_TK.double(), beta_TK.to(acc)))
    q, k = (x.repeat_interleave(rep, 1) if rep > 1 else x for x in (q, k))
    o_nKCE, last_SKDE = _attend(q, k, v, g, beta, state_SKDE, plan)
    o_TKE = place(o_nKCE.transpose(1, 2).reshape(-1, K, E), plan.places, plan.tokens)
    last = place(last_SKDE, plan.ranks, plan.order) if final_state else None
    return o_TKE.to(v_TKE.dtype), last


def _groups(q_THD: Tensor, K: int) -> int:
    if K % q_THD.shape[1]:
        raise ValueError(f"{K} value heads cannot be shared out over {q_THD.shape[1]} key heads")
    return K // q_THD.shape[1]


def _chunks(x_THD: Tensor, plan: ChunkPlan) -> Tensor:
    """Tokens as [n, heads, size, D]."""
    x_PHD = place(x_THD, plan.tokens, plan.places)
    return x_PHD.view(-1, plan.size, *x_THD.shape[1:]).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state_SKDE: Tensor, plan: ChunkPlan
) -> tuple[Tensor, Tensor]:
    """Outputs of all chunks and the state after each segment, both in the plan's order."""
    D, E = k.shape[-1], v.shape[-1]
    c_nKC = g.cumsum(-1)
    later_CC = torch.ones(plan.size, plan.size, dtype=torch.bool, device=g.device).triu_(1)
    between_nKCC = (c_nKC[..., :, None] - c_nKC[..., None, :]).masked_fill(later_CC, -torch.inf)
    decay_nKCC, start_nKC1 = between_nKCC.exp().to(k.dtype), c_nKC.exp().to(k.dtype)[..., None]
    beta_nKC1 = beta[..., None]
    system_nKCC = k @ k.mT * decay_nKCC * beta_nKC1
    right_nKCX = torch.cat([v * beta_nKC1, k * (start_nKC1 * beta_nKC1)], -1)
    # Only what is below the diagonal is read.
    solved = torch.linalg.solve_triangular(system_nKCC, right_nKCX, upper=False, unitriangular=True)
    u_nKCE, w_nKCD = solved.split([E, D], -1)
    write_nKDC, fade_nK11 = (k * decay_nKCC[..., -1, :, None]).mT, start_nKC1[..., -1:, :]
    new, before = [], []
    for at, members in enumerate(plan.rounds):
        part = slice(plan.starts[at], plan.starts[at + 1])
        current = state_SKDE[:members]
        before.append(current)
        new.append(u_nKCE[part] - w_nKCD[part] @ current)
        after = fade_nK11[part] * current + write_nKDC[part] @ new[-1]
        state_SKDE = torch.cat([after, state_SKDE[members:]])
    if not new:
        return torch.zeros_like(v), state_SKDE
    inside_nKCE = (q @ k.mT * decay_nKCC) @ torch.cat(new)
    return inside_nKCE + (q * start_nKC1) @ torch.cat(before), state_SKDE


def step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaStep`. Raises ValueError for heads that do not divide."""
    K, acc = v_BKE.shape[1], state_NKDE.dtype
    rep = _groups(q_BHD, K)
    q, k = (x.to(acc).repeat_interleave(rep, 1) for x in (q_BHD, k_BHD))
    state_BKDE = state_NKDE.index_select(0, slots) * g_BK.to(acc).exp()[..., None, None]
    change_BKE = beta_BK.to(acc)[..., None] * (v_BKE.to(acc) - (k[..., None, :] @ state_BKDE)[..., 0, :])
    state_BKDE += k[..., :, None] * change_BKE[..., None, :]
    state_NKDE.index_copy_(0, slots, state_BKDE)
    return ((scale * q)[..., None, :] @ state_BKDE)[..., 0, :].to(v_BKE.dtype)
