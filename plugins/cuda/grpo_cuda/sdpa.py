"""Packed attention with torch's scaled_dot_product_attention, over segments padded to like lengths.

For what the varlen kernels do not take: float32 and float64, head sizes of their own, values of another
size than keys. Segments are put in buckets of like lengths; where nothing but causality hides a key, no mask
is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from grpo_core.ops.common import Common
from grpo_core.ops.reference.attention import bounds, parent_list, visible

from .bits import repeatable
from .lengths import KeyPlan, gather, make_plan, shared

GROUPING = (torch.bfloat16, torch.float16)
"""Dtypes of the fused kernel that lets query heads share key heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """n segments, queries padded to Q and keys to L."""

    rows_q: Tensor
    """int64 [n * Q] rows of the queries; the number of tokens stands for a row of zeros."""
    rows_k: Tensor
    """int64 [n * L] rows of the (gathered) keys, likewise."""
    mask_n1QL: Tensor | None
    """True where a key is seen; None for plain causal attention of as many keys as queries."""
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The buckets of a packed batch, and the ways back."""

    keys: KeyPlan | None
    buckets: tuple[Bucket, ...]
    rows_q: Tensor
    """int64: the buckets' `rows_q`, one after the other."""
    at_T: Tensor
    """int64: where each query lies among `rows_q`."""
    rows_k: Tensor
    at_N: Tensor
    """int64: where each key lies among `rows_k`."""


def varlen(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.Varlen`."""
    return _attend(q_THD, k_TKD, v_TKE, cu_seqlens, None, scale, causal, window, common)


def shared_prefix(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, *, cu_seqlens: Tensor, parents: Tensor, max_seqlen: int,
    scale: float, window: int | None, common: Common | None = None,
) -> Tensor:  # fmt: skip
    """See `grpo_core.ops.attention.SharedPrefix`."""
    return _attend(q_THD, k_TKD, v_TKE, cu_seqlens, parents, scale, True, window, common)


def _attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKE: Tensor, cu_seqlens: Tensor, parents: Tensor | None, scale: float,
    causal: bool, window: int | None, common: Common | None,
) -> Tensor:  # fmt: skip
    T, H, K = q_THD.shape[0], q_THD.shape[1], k_TKD.shape[1]
    if H % K:
        raise ValueError(f"{H} query heads cannot be shared out over {K} key/value heads")
    plan = shared(
        common, ("sdpa", parents is None, causal, window),
        lambda: _plan(cu_seqlens, parents, T, causal, window, common),
    )  # fmt: skip
    if plan.keys is not None:
        k_TKD, v_TKE = gather(k_TKD, plan.keys), gather(v_TKE, plan.keys)
    q, k, v = (
        _place(x, *ways).split([part.numel() for part in parts])
        for x, ways, parts in (
            (q_THD, (plan.rows_q, plan.at_T), [one.rows_q for one in plan.buckets]),
            (k_TKD, (plan.rows_k, plan.at_N), [one.rows_k for one in plan.buckets]),
            (v_TKE, (plan.rows_k, plan.at_N), [one.rows_k for one in plan.buckets]),
        )
    )
    outputs = [q_THD.new_empty(0, H, v_TKE.shape[2])]
    for bucket, *parts in zip(plan.buckets, q, k, v, strict=True):
        q_nHQD, k_nKLD, v_nKLE = (x.unflatten(0, (bucket.n, -1)).transpose(1, 2) for x in parts)
        if H != K and (bucket.mask_n1QL is not None or q_THD.dtype not in GROUPING):
            # The kernel for masks and wide dtypes takes no groups of heads, and nothing else is fused there.
            k_nKLD, v_nKLE = (_repeated(x, H // K) for x in (k_nKLD, v_nKLE))
        o_nHQE = repeatable(
            scaled_dot_product_attention(
                q_nHQD, k_nKLD, v_nKLE, attn_mask=bucket.mask_n1QL, is_causal=bucket.mask_n1QL is None,
                scale=scale, enable_gqa=k_nKLD.shape[1] != H,
            )
        )  # fmt: skip
        outputs.append(o_nHQE.transpose(1, 2).flatten(0, 1))
    return _place(torch.cat(outputs), plan.at_T, plan.rows_q)


def _repeated(x_nKLD: Tensor, group: int) -> Tensor:
    """Each head for all query heads that read it; [n, K * group, L, D]."""
    n, K, L, D = x_nKLD.shape
    return x_nKLD[:, :, None].expand(n, K, group, L, D).reshape(n, K * group, L, D)


def _plan(
    cu_seqlens: Tensor, parents: Tensor | None, tokens: int, causal: bool, window: int | None,
    common: Common | None,
) -> Plan:  # fmt: skip
    ends = bounds(cu_seqlens, tokens, common)
    count = len(ends) - 1
    tree = [-1] * count if parents is None else parent_list(parents, count, common)
    keys = make_plan(ends, tree, cu_seqlens.device)
    ends_k = ends if keys is None else keys.cu_seqlens_k.tolist()
    alike: dict[tuple[int, int], list[int]] = {}
    for segment in range(count):
        queries, length = ends[segment + 1] - ends[segment], ends_k[segment + 1] - ends_k[segment]
        if queries:
            alike.setdefault((queries.bit_length(), length.bit_length()), []).append(segment)
    buckets = tuple(_bucket(members, ends, ends_k, causal, window) for members in alike.values())
    device = cu_seqlens.device
    rows_q, rows_k = (
        torch.cat([torch.empty(0, dtype=torch.int64), *rows])
        for rows in ([one.rows_q for one in buckets], [one.rows_k for one in buckets])
    )
    return Plan(
        keys=keys,
        buckets=tuple(
            Bucket(
                rows_q=one.rows_q, rows_k=one.rows_k, n=one.n,
                mask_n1QL=None if one.mask_n1QL is None else one.mask_n1QL.to(device),
            )
            for one in buckets
        ),
        rows_q=rows_q.to(device), at_T=_inverse(rows_q, ends[-1]).to(device),
        rows_k=rows_k.to(device), at_N=_inverse(rows_k, ends_k[-1]).to(device),
    )  # fmt: skip


def _bucket(
    members: list[int], ends: list[int], ends_k: list[int], causal: bool, window: int | None
) -> Bucket:
    """The bucket on the host."""
    queries = [ends[one + 1] - ends[one] for one in members]
    lengths = [ends_k[one + 1] - ends_k[one] for one in members]
    Q, L = max(queries), max(lengths)
    rows_q, rows_k = torch.full((len(members), Q), ends[-1]), torch.full((len(members), L), ends_k[-1])
    plain = causal and window is None and queries == lengths
    mask = None if plain else torch.ones(len(members), 1, Q, L, dtype=torch.bool)
    at_L = torch.arange(L)
    for line, (member, some, length) in enumerate(zip(members, queries, lengths, strict=True)):
        rows_q[line, :some] = torch.arange(ends[member], ends[member] + some)
        rows_k[line, :length] = torch.arange(ends_k[member], ends_k[member] + length)
        if mask is not None:
            # Padding queries see everything: a row without a key would be 0 / 0.
            at_Q = torch.arange(length - some, length)
            mask[line, 0, :some] = visible(at_Q, at_L, causal=causal, window=window) & (at_L < length)
    return Bucket(rows_q=rows_q.view(-1), rows_k=rows_k.view(-1), mask_n1QL=mask, n=len(members))


def _inverse(rows: Tensor, count: int) -> Tensor:
    """Where each of `count` rows lies; those that lie nowhere are after the last."""
    places = torch.full((count + 1,), rows.numel())
    places[rows] = torch.arange(rows.numel())
    return places[:count]


def _place(x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
    """Rows of x in another order, with rows of zeros where `rows` points behind the last; `back` is the way
    back of the gradient."""
    out: Tensor = _Place.apply(x, rows, back)
    return out


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, back)
        return _padded(x).index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        _, back = ctx.saved_tensors
        return _padded(grads[0]).index_select(0, back), None, None


def _padded(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
