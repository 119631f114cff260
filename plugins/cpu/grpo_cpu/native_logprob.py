"""loss.logprob of the C++ pack: bfloat16 products by torch, one fused pass over each chunk of logits.

The logits are rounded to bfloat16, as the rollout's are: the two agree better than either does with float32.
The backward pass computes each chunk's logits again and turns them into their own gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference.logprob import logprob as reference

from .native import load

CHUNK_ELEMENTS = 1 << 25
"""Logits alive at once, at most (64 MiB); one token at least."""
_ops = load()


def logprob(
    hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, *, temperature: float, group: Any
) -> tuple[Tensor, Tensor]:
    """loss.logprob. A vocabulary that is split over a group goes to the reference.

    Raises ValueError for a temperature that is not positive, IndexError for a label that the vocabulary
    does not hold.
    """
    if group is not None:
        return reference(hidden_TC, lm_head_VC, labels_T, temperature=temperature, group=group)
    if not temperature > 0:
        raise ValueError(f"log-probs need a temperature above 0, not {temperature}")
    if hidden_TC.dtype != torch.bfloat16 or lm_head_VC.dtype != torch.bfloat16:
        raise TypeError(
            f"wanted bfloat16 hidden states and head, not {hidden_TC.dtype} and {lm_head_VC.dtype}"
        )
    result: tuple[Tensor, Tensor] = _LogProb.apply(hidden_TC, lm_head_VC, labels_T, temperature)
    return result


def _chunks(tokens: int, vocab: int) -> list[slice]:
    """Even chunks: a short last one would waste a product."""
    most = max(1, CHUNK_ELEMENTS // max(vocab, 1))
    count = max(1, -(-tokens // most))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        T, V = hidden_TC.shape[0], lm_head_VC.shape[0]
        labels_T = labels_T.long().contiguous()
        logprob_T, entropy_T, lse_T = (torch.empty(T) for _ in range(3))
        parts = _chunks(T, V)
        room = hidden_TC.new_empty(parts[0].stop if parts else 0, V)
        for part in parts:
            logits_tV = torch.mm(hidden_TC[part], lm_head_VC.T, out=room[: part.stop - part.start])
            _ops.logprob_rows(
                logits_tV, labels_T[part], temperature, logprob_T[part], entropy_T[part], lse_T[part]
            )
        ctx.save_for_backward(hidden_TC, lm_head_VC, labels_T, entropy_T, lse_T)
        ctx.temperature = temperature
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TC, lm_head_VC, labels_T, entropy_T, lse_T = ctx.saved_tensors
        g_logprob_T, g_entropy_T = grads
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        T, V = hidden_TC.shape[0], lm_head_VC.shape[0]
        parts = _chunks(T, V)
        room = hidden_TC.new_empty(parts[0].stop if parts else 0, V)
        g_hidden_TC = (
            torch.empty_like(hidden_TC, memory_format=torch.contiguous_format) if wants_hidden else None
        )
        # One chunk's product is the gradient; several are added up in float32: bfloat16 would lose them.
        total_VC = torch.zeros(lm_head_VC.shape) if wants_head and len(parts) > 1 else None
        g_head_VC = (
            torch.empty_like(lm_head_VC, memory_format=torch.contiguous_format) if wants_head else None
        )
        if g_head_VC is not None and not parts:
            g_head_VC.zero_()
        for part in parts:
            g_logits_tV = torch.mm(hidden_TC[part], lm_head_VC.T, out=room[: part.stop - part.start])
            _ops.logprob_rows_backward(
                g_logits_tV,
                labels_T[part],
                ctx.temperature,
                g_logprob_T[part],
                g_entropy_T[part],
                entropy_T[part],
                lse_T[part],
            )
            if g_hidden_TC is not None:
                torch.mm(g_logits_tV, lm_head_VC, out=g_hidden_TC[part])
            if g_head_VC is not None:
                torch.mm(g_logits_tV.T, hidden_TC[part], out=g_head_VC)
                if total_VC is not None:
                    _ops.accumulate(total_VC, g_head_VC)
        if total_VC is not None and g_head_VC is not None:
            g_head_VC.copy_(total_VC)
        return g_hidden_TC, g_head_VC, None, None
