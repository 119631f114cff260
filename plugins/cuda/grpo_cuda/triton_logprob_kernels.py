"""Triton kernels of the fused head: statistics of a row's logits, and slopes of logits.

A tile of logits is made from hidden states and head in registers, used and dropped, as in Cut Cross-Entropy
(Wijmans et al. 2024, arXiv:2411.09009); sums over the vocabulary run online, as in FlashAttention (Dao et al.
2022; Milakov and Gimelshein 2018 for the sums). Where logits are bfloat16 or float16, a tile is rounded to
that dtype once, as the linear layer of a rollout engine rounds them, and everything after is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def logits_tile(
    hidden, head, t, v, T, V, C, stride_t, stride_v, inverse_temperature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS] of hidden head^T / temperature; -inf behind the vocabulary's end.

    EVEN says that DEPTH divides C.
    """
    rows = hidden + t.to(tl.int64)[:, None] * stride_t
    columns = head + v.to(tl.int64)[None, :] * stride_v
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, C, DEPTH):
        c = start + tl.arange(0, DEPTH)
        have_t, have_v = (t < T)[:, None], (v < V)[None, :]
        if not EVEN:
            have_t, have_v = have_t & (c < C)[None, :], have_v & (c < C)[:, None]
        h = tl.load(rows + c[None, :], mask=have_t, other=0.0)
        w = tl.load(columns + c[:, None], mask=have_v, other=0.0)
        z = tl.dot(h, w, z, input_precision=PRECISION)
    z = z.to(hidden.dtype.element_ty).to(tl.float32) * inverse_temperature
    return tl.where((v < V)[None, :], z, float("-inf"))


@triton.jit
def statistics_kernel(
    hidden, head, labels, top_ST, total_ST, shifted_ST, chosen_T, T, V, C, stride_t, stride_v,
    inverse_temperature,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of SPLIT columns: m = max z, sum exp(z - m), sum exp(z - m) (z - m); and the labels' z among them."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    first = split * SPLIT
    last = min(first + SPLIT, V)
    label = tl.load(labels + t, mask=t < T, other=-1).to(tl.int32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    shifted = tl.zeros([ROWS], tl.float32)
    chosen = tl.zeros([ROWS], tl.float32)
    for start in range(first, last, COLUMNS):
        v = start + tl.arange(0, COLUMNS)
        z = logits_tile(hidden, head, t, v, T, V, C, stride_t, stride_v, inverse_temperature,
                        ROWS, COLUMNS, DEPTH, EVEN, PRECISION)  # fmt: skip
        chosen += tl.sum(tl.where(v[None, :] == label[:, None], z, 0.0), 1)
        higher = tl.maximum(top, tl.max(z, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row of -inf so far: no inf - inf
        shrink = tl.exp(top - base)
        moved = tl.where(top == float("-inf"), 0.0, top - base)
        z -= base[:, None]
        p = tl.exp(z)
        # exp(-1e4) is 0 and so is its product; 0 * -inf is not. With a comparison Triton 3.7 spills on 9.0.
        shifted = shrink * (shifted + total * moved) + tl.sum(p * tl.maximum(z, -1e4), 1)
        total = total * shrink + tl.sum(p, 1)
        top = higher
    inside = t < T
    at = split.to(tl.int64) * T + t
    tl.store(top_ST + at, top, mask=inside)
    tl.store(total_ST + at, total, mask=inside)
    tl.store(shifted_ST + at, shifted, mask=inside)
    tl.store(chosen_T + t, chosen, mask=inside & (label >= first) & (label < last))


@triton.jit
def slopes_kernel(
    hidden, head, labels, top_T, log_total_T, entropy_T, g_logprob_T, g_entropy_T, scale, slopes, T, V, C,
    FIRST, WIDTH, stride_t, stride_v, stride_s, inverse_temperature,
    SCALED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dL/dz for the columns FIRST to FIRST + WIDTH, times `scale` where SCALED:
    [v = label] g_logprob - p (g_logprob + g_entropy (log p + entropy))."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    v = FIRST + column
    inside = t < T
    label = tl.load(labels + t, mask=inside, other=-1).to(tl.int32)
    top = tl.load(top_T + t, mask=inside, other=0.0)
    log_total = tl.load(log_total_T + t, mask=inside, other=0.0)
    entropy = tl.load(entropy_T + t, mask=inside, other=0.0)
    g_logprob = tl.load(g_logprob_T + t, mask=inside, other=0.0)
    g_entropy = tl.load(g_entropy_T + t, mask=inside, other=0.0)
    if SCALED:
        by = tl.load(scale)
        g_logprob, g_entropy = g_logprob * by, g_entropy * by
    z = logits_tile(hidden, head, t, v, T, V, C, stride_t, stride_v, inverse_temperature,
                    ROWS, COLUMNS, DEPTH, EVEN, PRECISION)  # fmt: skip
    logp = (z - top[:, None]) - log_total[:, None]
    slope = -tl.exp(logp) * (g_logprob[:, None] + g_entropy[:, None] * (logp + entropy[:, None]))
    slope = tl.where(logp == float("-inf"), 0.0, slope)
    slope += tl.where(v[None, :] == label[:, None], g_logprob[:, None], 0.0)
    at = slopes + t.to(tl.int64)[:, None] * stride_s + column[None, :]
    tl.store(at, slope.to(slopes.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])
