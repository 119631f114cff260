"""loss.logprob of the C++ pack: one fused pass over each chunk of logits.

Of bfloat16 operands the logits are rounded to bfloat16, as the rollout's are: the two agree better than
either does with float32. Float32 operands have float32 logits.
The backward pass turns each chunk's logits into their own gradient in place. The logits of a single chunk are
kept for that; those of several are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference.logprob import logprob as reference

from .native import load
from .native_products import products_of

CHUNK_ELEMENTS = 1 << 25
"""Logits alive at once, at most (64 MiB in bfloat16); one token at least."""
_ops = load()


def logprob(
    hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, *, temperature: float, group: Any,
    main_grad_VC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """loss.logprob. A vocabulary that is split over a group goes to the reference.

    Raises ValueError for a temperature that is not positive, IndexError for a label that the vocabulary
    does not hold.
    """
    if group is not None:
        return reference(
            hidden_TC, lm_head_VC, labels_T, temperature=temperature, group=group, main_grad_VC=main_grad_VC
        )
    if not temperature > 0:
        raise ValueError(f"log-probs need a temperature above 0, not {temperature}")
    if hidden_TC.dtype not in (torch.bfloat16, torch.float32) or lm_head_VC.dtype != hidden_TC.dtype:
        raise TypeError(
            "wanted hidden states and head in bfloat16 or both in float32, "
            f"not {hidden_TC.dtype} and {lm_head_VC.dtype}"
        )
    result: tuple[Tensor, Tensor] = _LogProb.apply(hidden_TC, lm_head_VC, labels_T, temperature, main_grad_VC)
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
        ctx: Any, hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, temperature: float,
        main_grad_VC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        T, V = hidden_TC.shape[0], lm_head_VC.shape[0]
        labels_T = labels_T.long().contiguous()
        logprob_T, entropy_T, lse_T = (torch.empty(T) for _ in range(3))
        parts = _chunks(T, V)
        room = _ops.empty_rows(hidden_TC, parts[0].stop if parts else 0, V)
        for part in parts:
            logits_tV = room[: part.stop - part.start]
            products_of(hidden_TC).linear_out(hidden_TC[part], lm_head_VC, logits_tV)
            _ops.logprob_rows(
                logits_tV, labels_T[part], temperature, logprob_T[part], entropy_T[part], lse_T[part]
            )
        ctx.save_for_backward(hidden_TC, lm_head_VC, labels_T, entropy_T, lse_T)
        ctx.temperature, ctx.main_grad_VC = temperature, main_grad_VC
        ctx.logits_TV = room if len(parts) == 1 and any(ctx.needs_input_grad) else None
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_TC, lm_head_VC, labels_T, entropy_T, lse_T = ctx.saved_tensors
        g_logprob_T, g_entropy_T = grads
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        parts = _chunks(hidden_TC.shape[0], lm_head_VC.shape[0])
        g_hidden_TC: Tensor | None = None
        if wants_hidden and len(parts) != 1:
            g_hidden_TC = torch.empty_like(hidden_TC, memory_format=torch.contiguous_format)
        head = _HeadGrad(lm_head_VC, ctx.main_grad_VC, len(parts)) if wants_head else None
        made_TV, ctx.logits_TV = ctx.logits_TV, None
        room = made_TV
        for part in parts:
            if made_TV is None:
                if room is None:
                    room = _ops.empty_rows(hidden_TC, parts[0].stop, lm_head_VC.shape[0])
                products_of(hidden_TC).linear_out(hidden_TC[part], lm_head_VC, room[: part.stop - part.start])
            g_logits_tV = room[: part.stop - part.start]
            _ops.logprob_rows_backward(
                g_logits_tV, labels_T[part], ctx.temperature, g_logprob_T[part], g_entropy_T[part],
                entropy_T[part], lse_T[part],
            )  # fmt: skip
            if wants_hidden:
                g_hidden_tC = products_of(hidden_TC).input_grad(g_logits_tV, lm_head_VC)
                if g_hidden_TC is None:
                    g_hidden_TC = g_hidden_tC
                else:
                    g_hidden_TC[part] = g_hidden_tC
            if head is not None:
                head.add(g_logits_tV, hidden_TC[part])
        return g_hidden_TC, None if head is None else head.result(), None, None, None


class _HeadGrad:
    """The sum of the head's gradient over chunks, in float32: bfloat16 would lose them."""

    def __init__(self, lm_head_VC: Tensor, main_grad_VC: Tensor | None, chunks: int) -> None:
        self.like_VC, self.main_grad_VC = lm_head_VC, main_grad_VC
        self.alone_VC: Tensor | None = None
        """One chunk's product is the gradient."""
        self.total_VC = main_grad_VC
        if main_grad_VC is None and chunks != 1:
            self.total_VC = torch.zeros(lm_head_VC.shape)

    def add(self, g_logits_tV: Tensor, hidden_tC: Tensor) -> None:
        """Add one chunk's share."""
        if self.total_VC is None:
            self.alone_VC = products_of(hidden_tC).weight_grad(g_logits_tV, hidden_tC)
        else:
            products_of(hidden_tC).add_weight_grad(g_logits_tV, hidden_tC, self.total_VC)

    def result(self) -> Tensor | None:
        """What autograd gets."""
        if self.main_grad_VC is not None:
            return None
        return self.alone_VC if self.total_VC is None else self.total_VC.to(self.like_VC.dtype)
