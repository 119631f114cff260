"""mla.decode in Triton, absorbed, over pages of rows [latent | rotary key]: where FlashMLA is not.

One program takes HEADS query heads of one sequence and SPAN of its tokens; a second kernel adds the spans up.
A row is read once for its score and its value. Spans lie at fixed places of a sequence, so that its bits
depend on nothing beside it. Memory: 2 (L + R) bytes a token, for each HEADS query heads from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_core.ops.common import Common
from grpo_core.ops.mla import LatentLayer

from .cache_decode import combine_kernel
from .mla import absorb, project
from .mla_cache import latents

SPAN = 512
"""Tokens of one program: enough programs for a GPU where sequences are few and long."""
HEADS = 16
"""Query heads of one program: the fewest rows of an operand of `tl.dot`."""


def decode(
    q_nope_BHN: Tensor, q_rope_BHR: Tensor, cache: LatentLayer, w_uk_HNL: Tensor, w_uv_HEL: Tensor, *,
    seqlens_k: Tensor, slots: Tensor, scale: float, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.mla.MlaDecode`, over `LatentPages`. Absorbed queries are of the queries' dtype."""
    layer = latents(cache)
    (B, H, _), R, L = q_nope_BHN.shape, q_rope_BHR.shape[2], layer.L
    if not B:
        return q_nope_BHN.new_empty(0, H, w_uv_HEL.shape[1])
    reading = layer.reading(slots, seqlens_k, common)
    rows, wide = layer.k_PSKD, q_nope_BHN.dtype == torch.float32
    spans = -(-reading.room // SPAN)
    q_BHW = absorb(q_nope_BHN, q_rope_BHR, w_uk_HNL)
    sums_BHSL = q_BHW.new_empty(B, H, spans, L, dtype=torch.float32)
    tops_BHS, totals_BHS = (q_BHW.new_empty(B, H, spans, dtype=torch.float32) for _ in range(2))
    latent_kernel[(B, triton.cdiv(H, HEADS), spans)](
        q_BHW, rows, reading.blocks_BW, reading.used_B, sums_BHSL, tops_BHS, totals_BHS, scale,
        reading.blocks_BW.stride(0), rows.stride(0), H, spans, L=L, R=R, PAGE=rows.shape[1],
        HEADS=HEADS, L2=max(16, triton.next_power_of_2(L)), R2=max(16, triton.next_power_of_2(R)),
        TILE=16 if wide else 32, SPAN=SPAN, PRECISION="ieee" if wide else "tf32", num_warps=4,
        num_stages=1 if wide else 2,
    )  # fmt: skip
    o_BHL = torch.empty(B, H, L, dtype=q_BHW.dtype, device=q_BHW.device)
    combine_kernel[(B * H,)](
        sums_BHSL, tops_BHS, totals_BHS, o_BHL, spans, E=L, E2=triton.next_power_of_2(L), num_warps=1
    )
    return project(o_BHL, w_uv_HEL)


@triton.jit
def latent_kernel(
    q, rows, table, lengths, sums, tops, totals, scale, table_b, page_stride, H, spans, L: tl.constexpr,
    R: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, L2: tl.constexpr, R2: tl.constexpr,
    TILE: tl.constexpr, SPAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One span: sum of exp(s - top) latent, its top and its total, for some query heads."""
    b, span = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mine = head < H
    at_l, at_r = tl.arange(0, L2), tl.arange(0, R2)
    in_l, in_r = at_l < L, at_r < R
    at_q = q + (b * H + head)[:, None] * (L + R)
    q_l = tl.load(at_q + at_l[None, :], mask=mine[:, None] & in_l[None, :], other=0.0)
    q_r = tl.load(at_q + L + at_r[None, :], mask=mine[:, None] & in_r[None, :], other=0.0)
    end = tl.minimum(tl.load(lengths + b), (span + 1) * SPAN)
    top = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, L2), tl.float32)
    for start in range(span * SPAN, end, TILE):
        n = start + tl.arange(0, TILE)
        there = n < end
        page = tl.load(table + b * table_b + n // PAGE, mask=there, other=0).to(tl.int64)
        at = rows + (page * page_stride + (n % PAGE) * (L + R))[:, None]
        latent = tl.load(at + at_l[None, :], mask=there[:, None] & in_l[None, :], other=0.0).to(q_l.dtype)
        rotary = tl.load(at + L + at_r[None, :], mask=there[:, None] & in_r[None, :], other=0.0).to(q_l.dtype)
        scores = tl.dot(q_l, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(q_r, tl.trans(rotary), scores, input_precision=PRECISION) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        fix = tl.exp(top - higher)
        p = tl.exp(scores - higher[:, None])
        total = total * fix + tl.sum(p, 1)
        acc = tl.dot(p.to(q_l.dtype), latent, acc * fix[:, None], input_precision=PRECISION)
        top = higher
    to = (b * H + head) * spans + span
    tl.store(tops + to, top, mask=mine)
    tl.store(totals + to, total, mask=mine)
    tl.store(sums + to[:, None] * L + at_l[None, :], acc, mask=mine[:, None] & in_l[None, :])
