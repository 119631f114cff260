"""Log-probabilities and entropy in chunks of tokens: the specification of `loss.logprob`.

With z = hidden lm_head^T / temperature and p = softmax(z):
    logprob = z[label] - logsumexp(z)          d logprob / d z_j = [j = label] - p_j
    entropy = logsumexp(z) - sum_j p_j z_j     d entropy / d z_j = -p_j (z_j - logsumexp(z) + entropy)
The backward pass computes each chunk's z again instead of keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import accumulate

CHUNK_ELEMENTS = 1 << 24
"""Largest number of logits alive at once (64 MiB of float32), one token at least."""


def logprob(
    hidden_TC: Tensor,
    lm_head_VC: Tensor,
    labels_T: Tensor,
    *,
    temperature: float,
    group: Any,
    main_grad_VC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference of `loss.logprob`; float64 results for float64 inputs.

    With a `group`, lm_head_VC is this rank's equal share of the rows, in the order of ranks; labels are
    ids of the whole vocabulary. Raises ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"log-probs need a temperature above 0, not {temperature}")
    apply: Any = _LogProb.apply
    logprob_T, entropy_T = apply(hidden_TC, lm_head_VC, labels_T, temperature, group, main_grad_VC)
    return logprob_T, entropy_T


def _chunks(tokens: int, vocab: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // max(vocab, 1))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _local_labels(labels_T: Tensor, vocab: int, group: Any) -> tuple[Tensor, Tensor]:
    """Labels as rows of this rank's share, and which of them lie in it."""
    labels_T = labels_T.long() - (0 if group is None else group.rank * vocab)
    mine_T = (labels_T >= 0) & (labels_T < vocab)
    if group is None and not bool(mine_T.all()):
        raise IndexError(f"a label lies outside of the vocabulary of {vocab}")
    return labels_T.clamp(0, max(vocab - 1, 0)), mine_T


def _reduce(x: Tensor, op: str, group: Any) -> Tensor:
    if group is not None:
        group.all_reduce(x, op=op)
    return x


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, temperature: float, group: Any,
        main_grad_VC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        acc = accumulate(hidden_TC.dtype)
        T, V = hidden_TC.shape[0], lm_head_VC.shape[0]
        rows_T, mine_T = _local_labels(labels_T, V, group)
        head_VC = lm_head_VC.to(acc)
        lse_T, entropy_T, logprob_T = (hidden_TC.new_empty(T, dtype=acc) for _ in range(3))
        for part in _chunks(T, V):
            z_tV = hidden_TC[part].to(acc) @ head_VC.T / temperature
            top_t = _reduce(z_tV.amax(-1), "max", group)
            label_t = z_tV.gather(1, rows_T[part, None])[:, 0] * mine_T[part]
            exp_tV = torch.exp(z_tV - top_t[:, None])
            total_t = _reduce(exp_tV.sum(-1), "sum", group)
            mean_t = _reduce((exp_tV * (z_tV - top_t[:, None])).sum(-1), "sum", group) / total_t
            lse_T[part] = total_t.log() + top_t
            entropy_T[part] = total_t.log() - mean_t
            logprob_T[part] = _reduce(label_t, "sum", group) - lse_T[part]
        ctx.save_for_backward(hidden_TC, lm_head_VC, rows_T, mine_T, lse_T, entropy_T)
        ctx.temperature, ctx.group, ctx.main_grad_VC = temperature, group, main_grad_VC
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TC, lm_head_VC, rows_T, mine_T, lse_T, entropy_T = ctx.saved_tensors
        g_logprob_T, g_entropy_T = grads
        acc = lse_T.dtype
        T, V = hidden_TC.shape[0], lm_head_VC.shape[0]
        head_VC = lm_head_VC.to(acc)
        g_hidden_TC = torch.zeros_like(hidden_TC)
        g_head_VC = torch.zeros_like(head_VC) if ctx.main_grad_VC is None else ctx.main_grad_VC
        for part in _chunks(T, V):
            h_tC = hidden_TC[part].to(acc)
            logp_tV = h_tC @ head_VC.T / ctx.temperature - lse_T[part, None]
            p_tV = logp_tV.exp()
            slope_tV = g_entropy_T[part, None] * (logp_tV + entropy_T[part, None])
            g_z_tV = -p_tV * (g_logprob_T[part, None] + slope_tV)
            g_z_tV.scatter_add_(1, rows_T[part, None], (g_logprob_T[part] * mine_T[part])[:, None])
            g_z_tV /= ctx.temperature
            g_hidden_TC[part] = _reduce(g_z_tV @ head_VC, "sum", ctx.group).to(hidden_TC.dtype)
            g_head_VC += g_z_tV.T @ h_tC
        g_head = None if ctx.main_grad_VC is not None else g_head_VC.to(lm_head_VC.dtype)
        return g_hidden_TC, g_head, None, None, None, None
