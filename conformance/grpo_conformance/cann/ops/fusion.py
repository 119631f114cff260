"""`npu_fusion_attention`, the attention of training, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, Table, one_dtype, require, split_heads, unused, wide
from .masks import check_compressed, seen, softmax_attention

OP = "npu_fusion_attention"
LARGEST = 2147483647
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The arguments that forward and backward share."""

    layout: str
    heads: int
    scale: float
    mask: Tensor | None
    mode: int
    before: int
    after: int
    ends_q: Sequence[int] | None
    ends_k: Sequence[int] | None


def _question(
    head_num: int, input_layout: str, scale: float, atten_mask: Tensor | None, sparse_mode: int, pre: int,
    after: int, actual_seq_qlen: Sequence[int] | None, actual_seq_kvlen: Sequence[int] | None,
) -> Question:  # fmt: skip
    return Question(
        layout=input_layout, heads=head_num, scale=scale, mask=atten_mask, mode=sparse_mode, before=pre,
        after=after, ends_q=actual_seq_qlen, ends_k=actual_seq_kvlen,
    )  # fmt: skip


def _check(ask: Question, q: Tensor, k: Tensor, v: Tensor) -> None:
    require(ask.layout in LAYOUTS, OP, f"input_layout of {', '.join(LAYOUTS)}, not {ask.layout!r}")
    one_dtype(OP, (q, k, v), FLOATS)
    rank = 4 if ask.layout in ("BSND", "BNSD") else 3
    require(all(x.dim() == rank for x in (q, k, v)), OP, f"{ask.layout} has {rank} dimensions")
    require(ask.mode in range(9), OP, f"sparse_mode 0 to 8, not {ask.mode}")
    if ask.mask is not None and ask.mode in (2, 3, 4):
        check_compressed(OP, ask.mask)
    if ask.layout == "TND":
        require(bool(ask.ends_q) and bool(ask.ends_k), OP, "TND needs actual_seq_qlen and actual_seq_kvlen")
        for name, ends, tokens in (("q", ask.ends_q, len(q)), ("kv", ask.ends_k, len(k))):
            rises = list(ends or []) == sorted(ends or []) and min(ends or [0]) >= 0
            fits = rises and (ends or [0])[-1] == tokens and len(ends or []) <= 1024
            require(
                fits, OP, f"actual_seq_{name}len: up to 1024 ends that rise to {tokens}, without a leading 0"
            )
        require(len(ask.ends_q or ()) == len(ask.ends_k or ()), OP, "as many ends of queries as of keys")
    for q_NQD, k_KSD, v_KSE in _rows(ask, q, k, v):
        _check_row(ask, q_NQD, k_KSD, v_KSE)


def _check_row(ask: Question, q_NQD: Tensor, k_KSD: Tensor, v_KSE: Tensor) -> None:
    heads, kv_heads = q_NQD.shape[0], k_KSD.shape[0]
    require(heads == ask.heads <= 256, OP, f"head_num is the number of query heads, {heads}, up to 256")
    require(kv_heads > 0 and heads % kv_heads == 0, OP, f"{heads} query heads over {kv_heads} key heads")
    require(k_KSD.shape[:2] == v_KSE.shape[:2], OP, "keys and values of one length and number of heads")
    dims = q_NQD.shape[2], k_KSD.shape[2], v_KSE.shape[2]
    require(
        dims[0] == dims[1] >= dims[2] and dims[0] <= 768, OP, f"D of queries = keys >= values, to 768: {dims}"
    )
    if ask.layout == "TND" and ask.mask is not None and q_NQD.shape[1]:
        rows = _seen(ask, q_NQD, k_KSD)
        require(bool(rows.any(-1).all()), OP, "in TND no query may be without a key")


def _seen(ask: Question, q_NQD: Tensor, k_KSD: Tensor) -> Tensor:
    return seen(OP, q_NQD.shape[1], k_KSD.shape[1], ask.mask, ask.mode, ask.before, ask.after)


def _rows(ask: Question, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each sequence of each tensor as [heads, length, dim]; all but the first are cut as the keys are."""
    if ask.layout == "TND":
        cuts_q, cuts_k = (list(pairwise([0, *(ends or ())])) for ends in (ask.ends_q, ask.ends_k))
        for (q0, q1), (k0, k1) in zip(cuts_q, cuts_k, strict=True):
            yield tuple(
                x[(q0 if i == 0 else k0) : (q1 if i == 0 else k1)].transpose(0, 1)
                for i, x in enumerate(tensors)
            )
        return
    yield from zip(
        *(_batched(ask, x, first=i == 0, q=tensors[0]) for i, x in enumerate(tensors)), strict=True
    )


def _batched(ask: Question, x: Tensor, *, first: bool, q: Tensor) -> Tensor:
    """[B, heads, length, dim] of the layouts with a batch."""
    if ask.layout == "BNSD":
        return x
    if ask.layout == "BSND":
        return x.transpose(1, 2)
    dim = q.shape[2] // ask.heads
    split = split_heads(x, x.shape[2] // dim)
    return split.transpose(1, 2) if ask.layout == "BSH" else split.permute(1, 2, 0, 3)


def _joined(ask: Question, rows: Sequence[Tensor]) -> Tensor:
    """The layout of the arguments again, of rows [heads, length, dim]."""
    if ask.layout == "TND":
        return torch.cat([row.transpose(0, 1) for row in rows])
    x = torch.stack(list(rows))
    if ask.layout == "BNSD":
        return x
    if ask.layout == "BSND":
        return x.transpose(1, 2).contiguous()
    return x.transpose(1, 2).flatten(2) if ask.layout == "BSH" else x.permute(2, 0, 1, 3).flatten(2)


def _statistic(ask: Question, rows: Sequence[Tensor]) -> Tensor:
    """float32 [T, N, 8] or [B, N, S, 8]: the kernel repeats each number."""
    if ask.layout == "TND":
        return torch.cat([row.transpose(0, 1) for row in rows]).expand(-1, -1, 8).contiguous()
    return torch.stack(list(rows)).expand(-1, -1, -1, 8).contiguous()


def fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0,
    keep_prob: float = 1.0, pre_tockens: int = LARGEST, next_tockens: int = LARGEST, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None,
    dropout_mask: Tensor | None = None, seed: int = 0, offset: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Softmax attention of each sequence; maximum and sum of the softmax go to the gradient."""
    unused(OP, pse=pse, padding_mask=padding_mask, prefix=prefix, sink=sink, dropout_mask=dropout_mask)
    require(keep_prob == 1.0, OP, "dropout is not simulated")
    ask = _question(head_num, input_layout, scale, atten_mask, sparse_mode, pre_tockens, next_tockens,
                    actual_seq_qlen, actual_seq_kvlen)  # fmt: skip
    _check(ask, query, key, value)
    done = [softmax_attention(q, k, v, _seen(ask, q, k), scale) for q, k, v in _rows(ask, query, key, value)]
    out, top, total = zip(*done, strict=True)
    empty = torch.empty(0)
    result = _joined(ask, out).to(query.dtype)
    return result, _statistic(ask, top), _statistic(ask, total), empty, 0, 0, 0


def fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None, softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = LARGEST, next_tockens: int = LARGEST, inner_precise: int = 0, seed: int = 0,
    offset: int = 0, numels: int = 0, prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None, actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0, gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key and value; the others are empty."""
    op = f"{OP}_grad"
    unused(op, pse=pse, padding_mask=padding_mask, prefix=prefix, sink=sink)
    given = softmax_max is not None and softmax_sum is not None and attention_in is not None
    require(given, op, "softmax_max, softmax_sum and attention_in of the forward pass")
    assert attention_in is not None
    ask = _question(head_num, input_layout, scale_value, atten_mask, sparse_mode, pre_tockens, next_tockens,
                    actual_seq_qlen, actual_seq_kvlen)  # fmt: skip
    _check(ask, query, key, value)
    # The output and its gradient are cut as the queries are.
    outer = zip(_outer(ask, attention_in), _outer(ask, dy), strict=True)
    grads = [
        _grad_row(ask, q, k, v, out, up)
        for (q, k, v), (out, up) in zip(_rows(ask, query, key, value), outer, strict=True)
    ]
    joined = (_joined(ask, part) for part in zip(*grads, strict=True))
    dq, dk, dv = (g.to(x.dtype) for g, x in zip(joined, (query, key, value), strict=True))
    return dq, dk, dv, torch.empty(0), torch.empty(0)


def _outer(ask: Question, x: Tensor) -> Iterator[Tensor]:
    """Rows of what has the queries' sequences, and heads of its own size."""
    if ask.layout == "TND":
        yield from (x[start:stop].transpose(0, 1) for start, stop in pairwise([0, *(ask.ends_q or ())]))
        return
    if ask.layout in ("BNSD", "BSND"):
        yield from (x if ask.layout == "BNSD" else x.transpose(1, 2))
        return
    split = split_heads(x, ask.heads)
    yield from (split.transpose(1, 2) if ask.layout == "BSH" else split.permute(1, 2, 0, 3))


def _grad_row(
    ask: Question, q_NQD: Tensor, k_KSD: Tensor, v_KSE: Tensor, out_NQE: Tensor, up_NQE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups = q_NQD.shape[0] // k_KSD.shape[0]
    q, up = wide(q_NQD), wide(up_NQE)
    k, v = (wide(x).repeat_interleave(groups, 0) for x in (k_KSD, v_KSE))
    scores = (q @ k.transpose(1, 2)) * ask.scale
    scores = scores.masked_fill(~_seen(ask, q_NQD, k_KSD), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    inner = (up * wide(out_NQE)).sum(-1, keepdim=True)
    d_scores = weights * (up @ v.transpose(1, 2) - inner) * ask.scale
    dk, dv = d_scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ up
    # A key head's gradient is the sum over the query heads that share it.
    dk, dv = (x.view(k_KSD.shape[0], groups, *x.shape[1:]).sum(1) for x in (dk, dv))
    return d_scores @ k, dk, dv


TABLE: Table = {OP: fusion_attention, f"{OP}_grad": fusion_attention_grad}
