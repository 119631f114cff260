"""Fused head: log-probabilities and entropies from hidden states, without logits in memory.

With z = round(hidden lm_head^T) / temperature and p = softmax(z), T tokens, V words, C features:

forward   one program for ROWS tokens and SPLIT words keeps m = max z, sum exp(z - m), sum exp(z - m) (z - m);
          the ceil(V / SPLIT) triples of a token are put together in order (and over the ranks of `group`).
backward  for a piece of the vocabulary at a time: slopes dL/dz of [tokens, piece] are made again from
          hidden and head, then  g_head[piece] (+)= slopes^T hidden  and  g_hidden += slopes head[piece].

Work: 2 T V C operations forward, 6 T V C backward (the same product again and one for each gradient). Matrix
units take bfloat16 or float16 with float32 sums; float32 goes without TF32. Memory: programs that run at the
same time share SPLIT words of the head, which the second-level cache holds, so the head is read once from
memory and hidden ceil(V / SPLIT) times; 12 ceil(V / SPLIT) + 4 bytes a token are written. Backward writes the
slopes (`ELEMENTS` at a time) once and reads them twice, and adds to g_hidden in float32 once for each piece.
Peak beyond inputs and gradients: the slopes of a piece, and 4 T C bytes.

Equal inputs give equal bits: every sum has one program and one order, there are no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_blocks as blocks
from .triton_logprob_kernels import slopes_kernel, statistics_kernel
from .triton_product import add_product, dense_rows, short_name, sizes


def logprob(
    hidden_TC: Tensor, lm_head_VC: Tensor, labels_T: Tensor, *, temperature: float, group: Any,
    main_grad_VC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `grpo_core.ops.fused.LogProb`. With a `group`, lm_head_VC is this rank's equal share of the rows.

    Raises ValueError for a temperature that is not above 0 or a head of another dtype than the hidden states,
    IndexError for a label outside of the vocabulary (without a group).
    """
    if not temperature > 0:
        raise ValueError(f"log-probs need a temperature above 0, not {temperature}")
    if hidden_TC.dtype != lm_head_VC.dtype:
        raise ValueError(f"hidden states of {hidden_TC.dtype} beside a head of {lm_head_VC.dtype}")
    V = lm_head_VC.shape[0]
    rows_T = labels_T.long() - (0 if group is None else group.rank * V)
    if group is None and bool(((rows_T < 0) | (rows_T >= V)).any()):
        raise IndexError(f"a label lies outside of the vocabulary of {V}")
    apply: Any = _LogProb.apply
    logprob_T, entropy_T = apply(hidden_TC, lm_head_VC, rows_T, temperature, group, main_grad_VC)
    return logprob_T, entropy_T


def statistics(
    hidden_TC: Tensor, lm_head_VC: Tensor, rows_T: Tensor, temperature: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log-probs, entropies, largest z, log sum exp(z - largest)) of each token, float32."""
    (T, C), V = hidden_TC.shape, lm_head_VC.shape[0]
    splits, tile = triton.cdiv(V, blocks.SPLIT), _tile(hidden_TC)
    top_ST, total_ST, shifted_ST = (hidden_TC.new_empty(splits, T, dtype=torch.float32) for _ in range(3))
    chosen_T = hidden_TC.new_zeros(T, dtype=torch.float32)
    if T:
        statistics_kernel[(triton.cdiv(T, tile.rows), splits)](
            hidden_TC, lm_head_VC, rows_T, top_ST, total_ST, shifted_ST, chosen_T, T, V, C,
            hidden_TC.stride(0), lm_head_VC.stride(0), 1 / temperature, SPLIT=blocks.SPLIT, **sizes(tile, C),
        )  # fmt: skip
    top_T = _reduce(top_ST.amax(0), "max", group)
    # A piece of nothing but -inf adds nothing, however far below the top it lies.
    below_ST = torch.where(top_ST == -torch.inf, 0.0, top_ST - top_T)
    shrink_ST = (top_ST - top_T).exp()
    total_T = _reduce((total_ST * shrink_ST).sum(0), "sum", group)
    shifted_T = _reduce((shrink_ST * (shifted_ST + total_ST * below_ST)).sum(0), "sum", group)
    log_total_T = total_T.log()
    logprob_T = _reduce(chosen_T, "sum", group) - top_T - log_total_T
    return logprob_T, log_total_T - shifted_T / total_T, top_T, log_total_T


def _tile(x: Tensor) -> blocks.ProductTile:
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    return blocks.logits_tile(short_name(x), 10 * major + minor)


def _reduce(x: Tensor, op: str, group: Any) -> Tensor:
    if group is not None:
        group.all_reduce(x, op=op)
    return x


def _scale(g_logprob_T: Tensor, g_entropy_T: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A power of two that brings the largest gradient to about 1, for slopes in float16: those of unlikely
    words would be 0 there. float32 [1], made on the device."""
    if dtype != torch.float16:
        return None
    largest = torch.stack([g_logprob_T, g_entropy_T]).abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.exp2(-largest.log2().floor()).view(1)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TC: Tensor, lm_head_VC: Tensor, rows_T: Tensor, temperature: float, group: Any,
        main_grad_VC: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden_TC, lm_head_VC = dense_rows(hidden_TC), dense_rows(lm_head_VC)
        logprob_T, entropy_T, *kept = statistics(hidden_TC, lm_head_VC, rows_T, temperature, group)
        ctx.save_for_backward(hidden_TC, lm_head_VC, rows_T, entropy_T, *kept)
        ctx.temperature, ctx.group, ctx.main_grad_VC = temperature, group, main_grad_VC
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TC, lm_head_VC, rows_T, entropy_T, top_T, log_total_T = ctx.saved_tensors
        main_VC = ctx.main_grad_VC
        (T, C), V = hidden_TC.shape, lm_head_VC.shape[0]
        rows = (rows_T, top_T, log_total_T, entropy_T, *(grad.contiguous() for grad in grads))
        wide = main_VC is not None or T > blocks.TOKENS
        g_head_VC = main_VC
        if main_VC is None and ctx.needs_input_grad[1]:
            make = lm_head_VC.new_empty if T else lm_head_VC.new_zeros
            g_head_VC = make(V, C, dtype=torch.float32 if wide else lm_head_VC.dtype)
        make = hidden_TC.new_empty if T else hidden_TC.new_zeros
        g_hidden_TC = make(T, C, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        _gradients(ctx, hidden_TC, lm_head_VC, rows, g_hidden_TC, g_head_VC)
        g_hidden = None
        if g_hidden_TC is not None:
            g_hidden = _reduce(g_hidden_TC, "sum", ctx.group).to(hidden_TC.dtype)
        g_head = None if main_VC is not None or g_head_VC is None else g_head_VC.to(lm_head_VC.dtype)
        return g_hidden, g_head, None, None, None, None


def _gradients(
    ctx: Any, hidden_TC: Tensor, lm_head_VC: Tensor, rows: tuple[Tensor, ...], g_hidden_TC: Tensor | None,
    g_head_VC: Tensor | None,
) -> None:  # fmt: skip
    """Fill g_hidden, and fill or add to g_head, piece by piece."""
    scale, factor = _scale(*rows[4:], hidden_TC.dtype), 1 / ctx.temperature
    buffer = hidden_TC.new_empty(0)
    chunks = blocks.logprob_chunks(
        hidden_TC.shape[0], lm_head_VC.shape[0], elements=blocks.ELEMENTS, most_tokens=blocks.TOKENS
    )
    for tokens, pieces in chunks:
        h_tC, chunk = hidden_TC[tokens], tuple(row[tokens] for row in rows)
        for piece in pieces:
            height, width = h_tC.shape[0], piece.stop - piece.start
            buffer = buffer if buffer.numel() else hidden_TC.new_empty(height * width)
            slopes_tv = buffer[: height * width].view(height, width)
            _slopes(h_tC, lm_head_VC, chunk, scale, slopes_tv, piece.start, factor)
            if g_head_VC is not None:
                add = ctx.main_grad_VC is not None or tokens.start > 0
                add_product(slopes_tv.T, h_tC, g_head_VC[piece], add=add, factor=factor, scale=scale)
            if g_hidden_TC is not None:
                out_tC, add = g_hidden_TC[tokens], piece.start > 0
                add_product(slopes_tv, lm_head_VC[piece], out_tC, add=add, factor=factor, scale=scale)


def _slopes(
    hidden_tC: Tensor, lm_head_VC: Tensor, rows: tuple[Tensor, ...], scale: Tensor | None, slopes_tv: Tensor,
    first: int, inverse_temperature: float,
) -> None:  # fmt: skip
    (t, width), C = slopes_tv.shape, hidden_tC.shape[1]
    tile = _tile(hidden_tC)
    slopes_kernel[(triton.cdiv(t, tile.rows), triton.cdiv(width, tile.columns))](
        hidden_tC, lm_head_VC, *rows, rows[1] if scale is None else scale, slopes_tv, t, lm_head_VC.shape[0],
        C, first, width, hidden_tC.stride(0), lm_head_VC.stride(0), slopes_tv.stride(0), inverse_temperature,
        SCALED=scale is not None, **sizes(tile, C),
    )  # fmt: skip
