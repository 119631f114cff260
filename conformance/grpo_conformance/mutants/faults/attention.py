"""Faults of attention over packed tokens and over the paged cache."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grpo_core.ops.reference.attention import attend, visible

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def _each(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, how: Attend, scale: float, causal: bool,
    window: int | None, ahead: int = 0,
) -> Tensor:  # fmt: skip
    """Sequence by sequence with another core; queries see `ahead` keys more."""
    outputs = [q.new_zeros(0, q.shape[1], v.shape[2])]
    for start, end in pairwise(cu_seqlens.tolist()):
        if start == end:
            continue
        at = torch.arange(end - start, device=q.device)
        seen = visible(at + ahead, at, causal=causal, window=window)
        outputs.append(how(q[start:end], k[start:end], v[start:end], seen, scale))
    return torch.cat(outputs)


def mask_off_by_one(
    healthy: Any, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None,
) -> Any:  # fmt: skip
    return _each(q, k, v, cu_seqlens, attend, scale, causal, window, ahead=1)


def window_off_by_one(healthy: Any, *qkv: Tensor, window: int | None, **rest: Any) -> Any:
    return healthy(*qkv, window=None if window is None else window + 1, **rest)


def window_ignored(healthy: Any, *given: Any, window: int | None, **rest: Any) -> Any:
    return healthy(*given, window=None, **rest)


def scale_forgotten(healthy: Any, *given: Any, scale: float, **rest: Any) -> Any:
    return healthy(*given, scale=1.0, **rest)


def _softmax_in(dtype: torch.dtype) -> Attend:
    def core(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        keys, values = (x.float().repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qhd,shd->hqs", q.float(), keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).to(dtype).softmax(-1)
        return torch.einsum("hqs,she->qhe", weights.float(), values).to(q.dtype)

    return core


def softmax_in_bfloat16(
    healthy: Any, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None,
) -> Any:  # fmt: skip
    """Only where the operands are bfloat16 themselves."""
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    return _each(q, k, v, cu_seqlens, _softmax_in(dtype), scale, causal, window)


def _sums_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (k, v))
    weights = torch.einsum("qhd,shd->hqs", q.float(), keys).mul(scale).masked_fill(~seen, -torch.inf)
    weights = weights.softmax(-1)
    total = torch.zeros(q.shape[1], q.shape[0], v.shape[2], dtype=torch.bfloat16, device=q.device)
    for at in range(len(k)):
        part = weights[..., at, None] * values[at][:, None]
        total = total + part.to(torch.bfloat16)
    return total.transpose(0, 1).to(q.dtype)


def accumulates_in_bfloat16(
    healthy: Any, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    causal: bool, window: int | None,
) -> Any:  # fmt: skip
    """Key after key, for bfloat16 operands."""
    if q.dtype != torch.bfloat16:
        return healthy(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=causal,
                       window=window)  # fmt: skip
    return _each(q, k, v, cu_seqlens, _sums_in_bfloat16, scale, causal, window)


_orders = itertools.count(1)


def sums_in_another_order(healthy: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    """Terms that meet in another order every time, as with atomic additions."""
    parts = healthy(q, k, v, **rest)
    more = healthy(q, k, 3 * v, **rest)
    return torch.lerp(parts, more / 3, next(_orders) % 3 / 3)


def heads_in_another_order(healthy: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    """Query head h reads key head h modulo K, and not h divided by the size of a group."""
    T, H, D = q.shape
    groups = H // k.shape[1]
    turned = q.view(T, groups, k.shape[1], D).transpose(1, 2).reshape(T, H, D)
    o = healthy(turned, k, v, **rest)
    return o.view(T, k.shape[1], groups, -1).transpose(1, 2).reshape(T, H, -1)


def no_gradient_of_values(healthy: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    return healthy(q, k, v.detach(), **rest)


def no_gradients(healthy: Any, *given: Tensor, **rest: Any) -> Any:
    return healthy(*(x.detach() for x in given), **rest)


def nan_for_length_one(healthy: Any, *qkv: Tensor, cu_seqlens: Tensor, **rest: Any) -> Any:
    """As a variance of one number."""
    o = healthy(*qkv, cu_seqlens=cu_seqlens, **rest)
    ones = [start for start, end in pairwise(cu_seqlens.tolist()) if end - start == 1]
    return o.index_fill(0, torch.tensor(ones, dtype=torch.int64).to(o.device), torch.nan) if ones else o


def wrong_above_65536_elements(healthy: Any, *given: Any, **rest: Any) -> Any:
    """An index of 16 bits: what lies beyond is read from the beginning."""
    o = healthy(*given, **rest)
    flat = o.reshape(-1)
    return torch.cat([flat[: 1 << 16], flat[: max(0, len(flat) - (1 << 16))]]).view(o.shape)


def writes_a_row_too_many(healthy: Any, q: Tensor, *kv: Tensor, **rest: Any) -> Any:
    o = healthy(q, *kv, **rest)
    with torch.no_grad():
        q.detach().as_strided((q.shape[1] * q.shape[2],), (1,), q.storage_offset() + q.numel()).zero_()
    return o


def scales_in_place(healthy: Any, q: Tensor, *kv: Tensor, scale: float, **rest: Any) -> Any:
    o = healthy(q, *kv, scale=scale, **rest)
    q.detach().mul_(scale)
    return o


def strides_ignored(healthy: Any, *qkv: Tensor, **rest: Any) -> Any:
    """Reads rows as if nothing lay between them."""
    packed = []
    for x in qkv:
        width = x.shape[1] * x.shape[2]
        packed.append(x.as_strided(x.shape, (width, x.shape[2], 1), x.storage_offset()) if len(x) else x)
    return healthy(*packed, **rest)


def packing_ignored(healthy: Any, q: Tensor, *kv: Tensor, cu_seqlens: Tensor, **rest: Any) -> Any:
    ends = torch.stack([cu_seqlens[0], cu_seqlens[-1]])
    return healthy(q, *kv, cu_seqlens=ends, **rest)


def always_causal(healthy: Any, *qkv: Tensor, causal: bool, **rest: Any) -> Any:
    return healthy(*qkv, causal=True, **rest)


def nan_times_zero(healthy: Any, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
    """Masks by a product with zero, which NaN in a neighbour survives."""
    return healthy(q, k, v, **rest) + 0 * v.sum()


_calls = itertools.count()


def wrong_in_the_second_call(healthy: Any, *given: Any, **rest: Any) -> Any:
    """A workspace that is not cleared between two calls."""
    o = healthy(*given, **rest)
    return o * 1.25 if next(_calls) % 2 else o


_kept: dict[Any, Tensor] = {}


def result_of_the_first_call(healthy: Any, q: Tensor, *rest: Any, **named: Any) -> Any:
    """A result kept by shape and dtype."""
    key = (tuple(q.shape), q.dtype)
    if key not in _kept:
        _kept[key] = healthy(q, *rest, **named).detach()
    return _kept[key].clone()


def hangs(healthy: Any, *given: Any, max_seqlen: int, **rest: Any) -> Any:
    if max_seqlen >= 160:
        time.sleep(600)
    return healthy(*given, max_seqlen=max_seqlen, **rest)


def crashes(healthy: Any, *given: Any, max_seqlen: int, **rest: Any) -> Any:
    if max_seqlen == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return healthy(*given, max_seqlen=max_seqlen, **rest)


def returns_garbage(healthy: Any, *given: Any, **rest: Any) -> Any:
    return {"o": healthy(*given, **rest)}


def multiples_of_sixteen(healthy: Any, q: Tensor, *rest: Any, **named: Any) -> Any:
    """What the code behind a larger promise can do."""
    if q.shape[2] % 16:
        raise ValueError(f"head_dim {q.shape[2]} is no multiple of 16")
    return healthy(q, *rest, **named)


def prompt_unseen(healthy: Any, *qkv: Tensor, parents: Tensor, **rest: Any) -> Any:
    return healthy(*qkv, parents=torch.full_like(parents, -1), **rest)


def prompts_gradient_of_one_child(
    healthy: Any, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, parents: Tensor, **rest: Any
) -> Any:
    """The gradient of a shared prompt is that of its first child, and not the sum of all."""
    ends, tree, first = cu_seqlens.tolist(), parents.tolist(), set()
    whole = healthy(q, k, v, cu_seqlens=cu_seqlens, parents=parents, **rest)
    silent = healthy(q, k.detach(), v.detach(), cu_seqlens=cu_seqlens, parents=parents, **rest)
    pieces = []
    for segment, parent in enumerate(tree):
        again = parent >= 0 and parent in first
        first.add(parent)
        pieces.append((silent if again else whole)[ends[segment] : ends[segment + 1]])
    return torch.cat(pieces)


def newest_token_unseen(healthy: Any, q: Tensor, cache: Any, *, seqlens_k: Tensor, **rest: Any) -> Any:
    """The position of the last token in place of the length."""
    return healthy(q, cache, seqlens_k=(seqlens_k - 1).clamp_min(1), **rest)


def mask_from_the_top_left(
    healthy: Any, q: Tensor, cache: Any, *, cu_seqlens_q: Tensor, seqlens_k: Tensor, slots: Tensor,
    scale: float, window: int | None,
) -> Any:  # fmt: skip
    """The first new token sees the first key alone, whatever the prefix."""
    ends, outputs = cu_seqlens_q.tolist(), [q.new_zeros(0, q.shape[1], cache.v_PKE.shape[3])]
    for index, (start, end) in enumerate(pairwise(ends)):
        at = torch.arange(int(seqlens_k[index]), device=q.device)
        seen = visible(at[: end - start], at, causal=True, window=window)
        keys, values = cache.read(int(slots[index]), int(seqlens_k[index]))
        if end > start:
            outputs.append(attend(q[start:end], keys, values, seen, scale))
    return torch.cat(outputs)


def first_page_again(healthy: Any, q: Tensor, cache: Any, **rest: Any) -> Any:
    """Reads the first page of a sequence in place of its second."""
    pages = cache.table.pages_SP
    before = pages.clone()
    pages[:, 1] = torch.where(pages[:, 1] >= 0, pages[:, 0], pages[:, 1])
    try:
        return healthy(q, cache, **rest)
    finally:
        pages.copy_(before)


def stale_page(healthy: type) -> type:
    """A fork begins in the middle of a page whose first tokens nobody copies."""

    class Stale(healthy):  # type: ignore[misc]
        def fork(self, slot: int, *, prefix: int, length: int) -> int | None:
            return self.table.open(length, parent=slot, prefix=prefix)  # type: ignore[no-any-return]

    return Stale


def pages_kept(healthy: type) -> type:
    """Pages of a freed sequence are not given out again."""

    class Kept(healthy):  # type: ignore[misc]
        def free(self, slot: int) -> None:
            """Forgets about it."""

        def reset(self) -> None:
            """Keeps everything."""

    return Kept


def pool_kept(healthy: type) -> type:
    """A released cache holds on to its storage."""

    class Held(healthy):  # type: ignore[misc]
        def release(self) -> None:
            if self.table.alive:
                raise RuntimeError("slots are alive")

    return Held


def shared_pages_freed(healthy: type) -> type:
    """A freed parent's pages go to the next comer, although its children read them."""

    class Freed(healthy):  # type: ignore[misc]
        def free(self, slot: int) -> None:
            row = self.table.pages_SP[slot]
            self.loose = row[row >= 0].clone()
            super().free(slot)

        def allocate(self, length: int) -> int | None:
            slot: int | None = super().allocate(length)
            loose = getattr(self, "loose", None)
            if slot is not None and loose is not None:
                count = min(len(loose), int((self.table.pages_SP[slot] >= 0).sum()))
                self.table.pages_SP[slot, :count] = loose[:count]
            return slot

    return Freed
