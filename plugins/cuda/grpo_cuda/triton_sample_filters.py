"""Drawing a token after top-k, top-p and min-p without sorting: thresholds by bisection, a program a row.

Logits are mapped to integers of the same order. The k-th largest is found bit by bit from counts of a row's
logits, the border of the nucleus in the same way from sums of their weights (radix selection; Alabi et al.
2012). Each pass reads a row from the second-level cache: 16 passes for bfloat16, 19 for float16, 32 for
float32, once for each of the two filters, and five more.

Tokens that equal the k-th largest stay in; of those at the border of the nucleus the lowest ids do, until
their mass reaches p. Sums of a piece are float32, over pieces float64, in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def piece_of(row, start, V, SHIFT: tl.constexpr, PIECE: tl.constexpr):
    """(ids, logits, ordered integers) of a piece; -inf and -1 behind the end."""
    v = start + tl.arange(0, PIECE)
    z = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    return v, z, tl.where(v < V, order_of(z, SHIFT), -1)


@triton.jit
def order_of(z, SHIFT: tl.constexpr):
    """Integers from 0 on in the order of float32 numbers whose last SHIFT bits say nothing."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0 equals 0
    signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (signed.to(tl.int64) + 0x80000000) >> SHIFT


@triton.jit
def tail(row, floor, top, heat, V, SHIFT: tl.constexpr, PIECE: tl.constexpr):
    """How many logits are not below the floor, and the sum of their weights."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for start in range(0, V, PIECE):
        _, z, order = piece_of(row, start, V, SHIFT, PIECE)
        kept = order >= floor
        count += tl.sum(kept.to(tl.int32), 0)
        mass += tl.sum(tl.where(kept, tl.exp((z - top) / heat), 0.0), 0).to(tl.float64)
    return count, mass


@triton.jit
def weights_of(
    row, start, top, heat, border, spare, equals, least, V, SHIFT: tl.constexpr, PIECE: tl.constexpr
):
    """(ids, weights, equals so far) of a piece; 0 for tokens that are filtered out."""
    v, z, order = piece_of(row, start, V, SHIFT, PIECE)
    tempered = (z - top) / heat
    equal = (order == border).to(tl.int32)
    rank = equals + tl.cumsum(equal, 0) - equal
    kept = (order > border) | ((equal > 0) & (rank < spare))
    kept = kept & (v < V) & (tempered.to(tl.float64) >= least)
    return v, tl.where(kept, tl.exp(tempered), 0.0), equals + tl.sum(equal, 0)


@triton.jit
def filtered_kernel(
    logits, heat_B, top_B, u_B, top_k_B, top_p_B, least_B, ids_B, total_B, V, stride,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr, SHIFT: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The token at u, and the total of the weights that are left; `least_B` is the logarithm of min-p."""
    b = tl.program_id(0)
    row = logits + b.to(tl.int64) * stride
    top, heat = tl.load(top_B + b), tl.load(heat_B + b)
    BITS: tl.constexpr = 32 - SHIFT
    border = tl.zeros([], tl.int64)
    if TOP_K:
        k = tl.load(top_k_B + b)
        k = tl.where((k <= 0) | (k > V), V, k)
        for i in range(BITS):
            tried = border + (tl.full([], 1, tl.int64) << (BITS - 1 - i))
            count, _ = tail(row, tried, top, heat, V, SHIFT, PIECE)
            border = tl.where(count >= k, tried, border)
    spare = tl.zeros([], tl.int32) + V
    if TOP_P:
        p = tl.load(top_p_B + b).to(tl.float64)
        _, mass = tail(row, border, top, heat, V, SHIFT, PIECE)
        goal, nucleus = mass * p, tl.zeros([], tl.int64)
        for i in range(BITS):
            tried = nucleus + (tl.full([], 1, tl.int64) << (BITS - 1 - i))
            _, mass = tail(row, tl.maximum(tried, border), top, heat, V, SHIFT, PIECE)
            nucleus = tl.where(mass >= goal, tried, nucleus)
        nucleus = tl.minimum(tl.maximum(nucleus, border), order_of(top, SHIFT))
        many, upto = tail(row, nucleus, top, heat, V, SHIFT, PIECE)
        few, above = tail(row, nucleus + 1, top, heat, V, SHIFT, PIECE)
        each = (upto - above) / tl.maximum(many - few, 1).to(tl.float64)
        wanted = tl.ceil(tl.where(each > 0, (goal - above) / tl.where(each > 0, each, 1.0), 1.0))
        fitting = tl.minimum(tl.maximum(wanted, 1.0), (many - few).to(tl.float64)).to(tl.int32)
        border = tl.where(p < 1, nucleus, border)
        spare = tl.where(p < 1, fitting, spare)
    least = tl.load(least_B + b) if MIN_P else float("-inf")
    total = tl.zeros([], tl.float64)
    equals = tl.zeros([], tl.int32)
    for start in range(0, V, PIECE):
        _, weights, equals = weights_of(row, start, top, heat, border, spare, equals, least, V, SHIFT, PIECE)
        total += tl.sum(weights, 0).to(tl.float64)
    target = tl.load(u_B + b).to(tl.float64) * total
    before = tl.zeros([], tl.float64)
    equals = tl.zeros([], tl.int32)
    passed = tl.zeros([], tl.int32)
    last = tl.zeros([], tl.int32)
    for start in range(0, V, PIECE):
        v, weights, equals = weights_of(row, start, top, heat, border, spare, equals, least, V, SHIFT, PIECE)
        cumulative = before + tl.cumsum(weights.to(tl.float64), 0)
        passed += tl.sum(((cumulative <= target) & (v < V)).to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(weights > 0, v, 0), 0))
        before += tl.sum(weights, 0).to(tl.float64)
    tl.store(ids_B + b, tl.minimum(passed, last))
    tl.store(total_B + b, total)
