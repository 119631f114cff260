"""Log-probabilities and entropy: products over chunks of tokens, softmax over pieces that stay in cache.

The formulas are those of `grpo_core.ops.reference.logprob`. In bfloat16 the logits are rounded once, as the
rollout's linear layer rounds them, and everything after is float32. The backward pass makes each chunk's
logits again, turns them into their own gradient in place, and multiplies from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grpo_core.errors import PlanError

from .rows import pieces

CHUNK = 1 << 25
"""Logits of a chunk, 64 MiB in bfloat16: large enough that adding up the head's gradient costs little."""
PIECE = 1 << 19
"""Logits of a float32 piece, 2 MiB."""


def logprob(
    hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, *, temperature: float, group: Any,
    main_grad_VC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.LogProb`. Raises ValueError for a temperature that is not above 0,
    IndexError for a label outside of the vocabulary, PlanError for a group of several ranks."""
    if not temperature > 0:
        raise ValueError(f"log-probs need a temperature above 0, not {temperature}")
    if group is not None and group.size > 1:
        raise PlanError(
            f"log-probs over a vocabulary split between {group.size} ranks",
            why="loss.logprob of cpu:torch takes the whole vocabulary",
            fix="set ops: {loss.logprob: core:reference}",
        )
    V = lm_head_VC.shape[0]
    if bool(((labels_T < 0) | (labels_T >= V)).any()):
        raise IndexError(f"a label lies outside of the vocabulary of {V}")
    logprob_T, entropy_T = _LogProb.apply(hidden_TC, lm_head_VC, labels_T.long(), temperature, main_grad_VC)
    return logprob_T, entropy_T


def _chunks(hidden_TC: Tensor, lm_head_VC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of tokens with their logits [t, V], one buffer for all."""
    V, buffer = lm_head_VC.shape[0], hidden_TC.new_empty(0)
    for part in pieces(hidden_TC.shape[0], V, CHUNK):
        count = part.stop - part.start
        buffer = buffer if buffer.numel() else hidden_TC.new_empty(count, V)
        yield part, torch.mm(hidden_TC[part], lm_head_VC.T, out=buffer[:count])


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, temperature: float,
        main_grad_VC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        T, V = hidden_TC.shape[0], lm_head_VC.shape[0]
        acc = torch.promote_types(hidden_TC.dtype, torch.float32)
        logprob_T, entropy_T, lse_T = (hidden_TC.new_empty(T, dtype=acc) for _ in range(3))
        for chunk, logits_tV in _chunks(hidden_TC, lm_head_VC):
            for piece in pieces(logits_tV.shape[0], V, PIECE):
                at = slice(chunk.start + piece.start, chunk.start + piece.stop)
                z_tV = logits_tV[piece].to(acc, copy=True).mul_(1 / temperature)
                top_t1 = z_tV.amax(-1, keepdim=True)
                z_tV -= top_t1
                label_t = z_tV.gather(1, labels_T[at, None])[:, 0]
                p_tV = z_tV.exp()
                total_t = p_tV.sum(-1)
                log_t = total_t.log()
                logprob_T[at] = label_t - log_t
                entropy_T[at] = log_t - p_tV.mul_(z_tV).sum(-1) / total_t
                lse_T[at] = log_t + top_t1[:, 0]
        ctx.save_for_backward(hidden_TC, lm_head_VC, labels_T, lse_T, entropy_T)
        ctx.temperature, ctx.main_grad_VC = temperature, main_grad_VC
        ctx.set_materialize_grads(False)
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TC, lm_head_VC, labels_T, lse_T, entropy_T = ctx.saved_tensors
        g_hidden_TC = torch.empty_like(hidden_TC)
        given = ctx.main_grad_VC is not None
        g_head_VC = ctx.main_grad_VC if given else torch.zeros_like(lm_head_VC, dtype=lse_T.dtype)
        for chunk, logits_tV in _chunks(hidden_TC, lm_head_VC):
            for piece in pieces(logits_tV.shape[0], lm_head_VC.shape[0], PIECE):
                at = slice(chunk.start + piece.start, chunk.start + piece.stop)
                g = [None if grad is None else grad[at] for grad in grads]
                logits_tV[piece] = _logit_grads(
                    logits_tV[piece], labels_T[at], lse_T[at], entropy_T[at], g[0], g[1], ctx.temperature
                )
            torch.mm(logits_tV, lm_head_VC, out=g_hidden_TC[chunk])
            g_head_VC += logits_tV.T @ hidden_TC[chunk]
        return g_hidden_TC, None if given else g_head_VC.to(lm_head_VC.dtype), None, None, None


def _logit_grads(
    logits_tV: Tensor, labels_t: Tensor, lse_t: Tensor, entropy_t: Tensor, g_logprob_t: Tensor | None,
    g_entropy_t: Tensor | None, temperature: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits of a piece, float32 [t, V]."""
    logp_tV = logits_tV.to(lse_t.dtype, copy=True).mul_(1 / temperature).sub_(lse_t[:, None])
    if g_entropy_t is None:
        g_tV = logp_tV.exp_()
        g_tV *= 0 if g_logprob_t is None else (g_logprob_t / -temperature)[:, None]
    else:
        p_tV = logp_tV.exp()
        base_t = entropy_t * g_entropy_t + (0 if g_logprob_t is None else g_logprob_t)
        g_tV = logp_tV.mul_(g_entropy_t[:, None]).add_(base_t[:, None]).mul_(p_tV).mul_(-1 / temperature)
    if g_logprob_t is not None:
        g_tV.scatter_add_(1, labels_t[:, None], (g_logprob_t / temperature)[:, None])
    return g_tV
