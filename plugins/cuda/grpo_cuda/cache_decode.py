"""attention.decode over pages of any size in Triton: where flash-attn is not, or its pages are too long.

One program takes one key head of one sequence and SPAN of its keys, with all query heads that read that head;
a second kernel adds the spans up. Spans lie at fixed places of a sequence, so that its bits depend on nothing
beside it. Memory: keys and values are read once; two operations for each byte of them and query head of the
group: bound by memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.ops.attention import LayerCache
from grpo_core.ops.common import Common

from .cache import paged

SPAN = 512
"""Keys of one program: enough programs for a GPU where sequences are few and long."""
ROWS = 16
"""Fewest rows of an operand of `tl.dot`."""


def decode(
    q_BHD: Tensor, cache: LayerCache, *, seqlens_k: Tensor, slots: Tensor, scale: float, window: int | None,
    common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Decode`, over a `PagedLayer`."""
    layer = paged(cache)
    k, v = layer.k_PSKD, layer.v_PSKE
    (B, H, D), (_, page, K, E) = q_BHD.shape, v.shape
    out_BHE = q_BHD.new_empty(B, H, E)
    if not B:
        return out_BHE
    reading = layer.reading(slots, seqlens_k, common)
    spans = -(-reading.room // SPAN)
    q_BHD = q_BHD.contiguous()
    sums_BHSE = q_BHD.new_empty(B, H, spans, E, dtype=torch.float32)
    tops_BHS, totals_BHS = (q_BHD.new_empty(B, H, spans, dtype=torch.float32) for _ in range(2))
    wide = q_BHD.dtype == torch.float32
    decode_kernel[(B, K, spans)](
        q_BHD, k, v, reading.blocks_BW, reading.used_B, sums_BHSE, tops_BHS, totals_BHS, scale,
        0 if window is None else window, reading.blocks_BW.stride(0), k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2), H // K, spans,
        D=D, E=E, PAGE=page, ROWS=max(ROWS, triton.next_power_of_2(H // K)),
        D2=max(ROWS, triton.next_power_of_2(D)), E2=max(ROWS, triton.next_power_of_2(E)),
        TILE=32 if wide or max(D, E) > 128 else 64, SPAN=SPAN, PRECISION="ieee" if wide else "tf32",
        num_warps=4,
    )  # fmt: skip
    combine_kernel[(B * H,)](
        sums_BHSE, tops_BHS, totals_BHS, out_BHE, spans, E=E, E2=triton.next_power_of_2(E), num_warps=1
    )
    return out_BHE


@triton.jit
def decode_kernel(
    q, k, v, table, lengths, sums, tops, totals, scale, window, table_b, k_page, k_row, k_head, v_page, v_row,
    v_head, group, spans, D: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    D2: tl.constexpr, E2: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One span: sum of exp(s - top) v, its top and its total, for the query heads of one key head."""
    b, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    row, d, e = tl.arange(0, ROWS), tl.arange(0, D2), tl.arange(0, E2)
    at_head = (b * tl.num_programs(1) + head) * group + row
    mine = row < group
    query = tl.load(q + at_head[:, None] * D + d[None, :], mask=mine[:, None] & (d < D)[None, :], other=0.0)
    end = tl.minimum(length, (span + 1) * SPAN)
    low = span * SPAN
    if window > 0:
        low = tl.maximum(low, length - window)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E2), tl.float32)
    # A tile starts at a multiple of its size, and holds a key that is seen.
    for start in range(low // TILE * TILE, end, TILE):
        n = start + tl.arange(0, TILE)
        there = n < end
        page = tl.load(table + b * table_b + n // PAGE, mask=there, other=0).to(tl.int64)
        at_k = page * k_page + (n % PAGE) * k_row + head * k_head
        keys = tl.load(k + at_k[None, :] + d[:, None], mask=there[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(query, keys.to(query.dtype), input_precision=PRECISION) * scale
        scores = tl.where((there & (n >= low))[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        fix = tl.exp(top - higher)
        p = tl.exp(scores - higher[:, None])
        total = total * fix + tl.sum(p, 1)
        at_v = page * v_page + (n % PAGE) * v_row + head * v_head
        values = tl.load(v + at_v[:, None] + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0)
        acc = acc * fix[:, None] + tl.dot(
            p.to(query.dtype), values.to(query.dtype), input_precision=PRECISION
        )
        top = higher
    at = at_head * spans + span
    tl.store(tops + at, top, mask=mine)
    tl.store(totals + at, total, mask=mine)
    tl.store(sums + at[:, None] * E + e[None, :], acc, mask=mine[:, None] & (e < E)[None, :])


@triton.jit
def combine_kernel(sums, tops, totals, out, spans, E: tl.constexpr, E2: tl.constexpr):
    """The spans of one query head, one after the other: those without keys have a top of -inf."""
    head = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E2)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros((E2,), tl.float32)
    for span in range(spans):
        at = head * spans + span
        found = tl.load(tops + at)
        if found > float("-inf"):
            higher = tl.maximum(top, found)
            fix, weight = tl.exp(top - higher), tl.exp(found - higher)
            part = tl.load(sums + at * E + e, mask=e < E, other=0.0)
            acc = acc * fix + part * weight
            total = total * fix + tl.load(totals + at) * weight
            top = higher
    tl.store(out + head * E + e, (acc / total).to(out.dtype.element_ty), mask=e < E)
