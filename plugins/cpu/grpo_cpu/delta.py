"""gated_delta.chunk and gated_delta.step in torch.

A chunk of tokens is one set of matrix products (the UT transform of Yang et al. 2024, arXiv 2406.06484,
section 3.2, with the decay of arXiv 2412.06464, section 3.3). With c the cumulative log decay within a
chunk, D_ij = exp(c_i - c_j) for i >= j and M the state at its start:

    (I + tril(beta k k^T * D, -1)) [u | w] = [beta v | beta exp(c) k]
    new = u - w M,    o = scale (exp(c) q M + (q k^T * D) new),    M' = exp(c_last) M + (D_last k)^T new

Only the states are carried from chunk to chunk; all else is a product over all chunks at once, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import accumulate, bounds

from .delta_plan import ChunkPlan, Pad, Unpad, plan_chunks
from .triangular import Solve, minus_product


def chunk(
    q_THD: Tensor, k_THD: Tensor, v_TKE: Tensor, g_TK: Tensor, beta_TK: Tensor, *, cu_seqlens: Tensor,
    scale: float, initial_state_SKDE: Tensor | None, final_state: bool, common: Common | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaChunk`."""
    K, E = v_TKE.shape[1:]
    H, D = q_THD.shape[1:]
    if K % H:
        raise ValueError(f"{K} value heads cannot be shared out over {H} key heads")
    plan = plan_chunks(tuple(bounds(cu_seqlens, q_THD.shape[0], common)))
    acc = accumulate(v_TKE.dtype)
    if initial_state_SKDE is None:
        state_SKDE = v_TKE.new_zeros(plan.order.numel(), K, D, E, dtype=acc)
    else:
        state_SKDE = initial_state_SKDE.to(acc).index_select(0, plan.order)
    q, k, v = (_chunks(x, plan, acc) for x in (q_THD, k_THD, v_TKE))
    g, beta = (_chunks(x[..., None], plan, acc)[..., 0] for x in (g_TK, beta_TK))
    o_nKCE, last_SKDE = _attend(q * scale, k, v, g, beta, state_SKDE, plan)
    o_TKE = Unpad.apply(o_nKCE.transpose(1, 2).reshape(-1, K, E), plan)
    return o_TKE.to(v_TKE.dtype), last_SKDE.index_select(0, plan.ranks) if final_state else None


def _chunks(x_THD: Tensor, plan: ChunkPlan, acc: torch.dtype) -> Tensor:
    """Tokens as [n, heads, size, D], contiguous."""
    x_PHD: Tensor = Pad.apply(x_THD, plan)
    return x_PHD.view(-1, plan.size, *x_THD.shape[1:]).transpose(1, 2).to(acc).contiguous()


def _attend(
    q_nHCD: Tensor, k_nHCD: Tensor, v_nKCE: Tensor, g_nKC: Tensor, beta_nKC: Tensor, state_SKDE: Tensor,
    plan: ChunkPlan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of all chunks and the state after each segment, both in the plan's order."""
    n, H, C, D = k_nHCD.shape
    K, E = v_nKCE.shape[1], v_nKCE.shape[3]
    rep = K // H
    decay_nKCC, start_nKC1 = _decays(g_nKC)
    grouped = (n, H, rep, C, C)
    by_head_nHrCC = decay_nKCC.view(grouped)
    k_nHDC = k_nHCD.mT
    gram_nHCC, scores_nHCC = k_nHCD @ k_nHDC, q_nHCD @ k_nHDC
    system_nKCC = (gram_nHCC[:, :, None] * by_head_nHrCC).view(n, K, C, C) * beta_nKC[..., None]
    q_nKCD, k_nKCD = (x.repeat_interleave(rep, 1) if rep > 1 else x for x in (q_nHCD, k_nHCD))
    beta_nKC1 = beta_nKC[..., None]
    right_nKCX = torch.cat([v_nKCE * beta_nKC1, k_nKCD * (start_nKC1 * beta_nKC1)], -1)
    u_nKCE, w_nKCD = Solve.apply(system_nKCC, right_nKCX).split([E, D], -1)
    write_nKCD = k_nKCD * decay_nKCC[..., -1, :, None]
    new_nKCE, before_nKDE, last_SKDE = Scan.apply(
        u_nKCE, w_nKCD, write_nKCD, start_nKC1[..., -1, 0], state_SKDE, plan
    )
    weights_nKCC = (scores_nHCC[:, :, None] * by_head_nHrCC).view(n, K, C, C)
    inside_nKCE, read_nKCD = weights_nKCC @ new_nKCE, q_nKCD * start_nKC1
    o_bCE = torch.baddbmm(*(x.flatten(0, 1) for x in (inside_nKCE, read_nKCD, before_nKDE)))
    return o_bCE.view(n, K, C, E), last_SKDE


def _decays(g_nKC: Tensor) -> tuple[Tensor, Tensor]:
    """exp(c_i - c_j) for i >= j, else 0, as [n, K, C, C]; exp(c_i) as [n, K, C, 1].

    A few tokens of strong decay make c so large that float32 would lose the small differences after them:
    whole numbers and fractions are subtracted apart.
    """
    total_nKC = g_nKC.double().cumsum(-1)
    whole_nKC = total_nKC.detach().floor()
    part_nKC = (total_nKC - whole_nKC).to(g_nKC.dtype)
    whole_nKC = whole_nKC.to(g_nKC.dtype)
    between_nKCC = part_nKC[..., None] - part_nKC[..., None, :]
    between_nKCC = between_nKCC + (whole_nKC[..., None] - whole_nKC[..., None, :])
    later_CC = torch.ones(g_nKC.shape[-1], g_nKC.shape[-1], dtype=torch.bool).triu_(1)
    decay_nKCC = between_nKCC.masked_fill(later_CC, -torch.inf).exp()
    return decay_nKCC, total_nKC.to(g_nKC.dtype).exp()[..., None]


class Scan(torch.autograd.Function):
    """new = u - w M, M' = fade M + write^T new, from chunk to chunk. Returns new, every M, the last M."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, w: Tensor, write: Tensor, fade: Tensor, state: Tensor, plan: ChunkPlan
    ) -> tuple[Tensor, Tensor, Tensor]:
        new = torch.empty(u.shape, dtype=u.dtype)
        before = u.new_empty(*fade.shape, *state.shape[2:])
        last = state.clone()
        for at, count in enumerate(plan.rounds):
            part = slice(plan.starts[at], plan.starts[at + 1])
            current = last[:count]
            before[part] = current
            new[part] = torch.sub(u[part], w[part] @ current)
            current.mul_(fade[part][..., None, None]).add_(write[part].mT @ new[part])
        ctx.save_for_backward(w, write, fade, new, before)
        ctx.plan = plan
        return new, before, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, write, fade, new, before = ctx.saved_tensors
        d_new, d_before, d_last = grads[0].clone(), grads[1], grads[2].clone()
        d_after = torch.empty_like(before)
        for at in reversed(range(len(ctx.plan.rounds))):
            part = slice(ctx.plan.starts[at], ctx.plan.starts[at + 1])
            current = d_last[: ctx.plan.rounds[at]]
            d_after[part] = current
            d_new[part] += write[part] @ current
            current.mul_(fade[part][..., None, None]).add_(d_before[part]).sub_(w[part].mT @ d_new[part])
        d_fade = torch.einsum("nkde,nkde->nk", before, d_after)
        return d_new, minus_product(d_new, before.mT), new @ d_after.mT, d_fade, d_last, None


def step(
    q_BHD: Tensor, k_BHD: Tensor, v_BKE: Tensor, g_BK: Tensor, beta_BK: Tensor, *, state_NKDE: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.linear_attention.DeltaStep`."""
    B, K, E = v_BKE.shape
    H, D = q_BHD.shape[1:]
    if K % H:
        raise ValueError(f"{K} value heads cannot be shared out over {H} key heads")
    acc = state_NKDE.dtype
    q, k = (x.to(acc).repeat_interleave(K // H, 1).reshape(B * K, D) for x in (q_BHD, k_BHD))
    state_bDE = state_NKDE.index_select(0, slots).view(B * K, D, E)
    state_bDE *= g_BK.to(acc).exp().view(-1, 1, 1)
    change_bE = v_BKE.to(acc).reshape(B * K, E) - (k[:, None] @ state_bDE)[:, 0]
    change_bE *= beta_BK.to(acc).reshape(-1, 1)
    state_bDE.baddbmm_(k[:, :, None], change_bE[:, None])
    o_bE = (scale * q)[:, None] @ state_bDE
    state_NKDE.index_copy_(0, slots, state_bDE.view(B, K, D, E))
    return o_bE.view(B, K, E).to(v_BKE.dtype)
