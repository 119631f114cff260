"""Attention for inference over pages, and the write to them. No gradients: torch_npu has none either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .checks import FLOATS, HALVES, Table, one_dtype, require, split_heads, unused
from .masks import check_compressed, seen, softmax_attention

LARGEST = 2147483647
PAGE_SIZES = (128, 256, 384, 512)
LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND", "TND", "TND_NTD", "NTD_TND")
SIMULATED = ("BNSD", "BSND", "TND")
ROPE_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The arguments of both forms."""

    op: str
    layout: str
    heads: int
    kv_heads: int
    scale: float
    mask: Tensor | None
    mode: int
    before: int
    after: int
    ends_q: Sequence[int] | None
    lengths: Sequence[int] | None
    table: Tensor | None
    block: int


def _check(ask: Question, q: Tensor, k: Tensor, v: Tensor) -> None:
    op = ask.op
    require(ask.layout in LAYOUTS, op, f"input_layout of {', '.join(LAYOUTS)}, not {ask.layout!r}")
    require(ask.layout in SIMULATED, op, f"layout {ask.layout} is not simulated, only {', '.join(SIMULATED)}")
    one_dtype(op, (q, k, v), HALVES)
    require(all(x.is_contiguous() for x in (q, k, v)), op, "contiguous tensors")
    axis = {"BNSD": 1, "BSND": 2, "TND": 1}[ask.layout]
    require(q.dim() == (3 if ask.layout == "TND" else 4), op, f"queries of {ask.layout}, not {list(q.shape)}")
    require(q.shape[axis] == ask.heads, op, f"num_heads {ask.heads} of queries with {q.shape[axis]}")
    require(q.shape[-1] <= 512, op, f"D up to 512, not {q.shape[-1]}")
    groups = ask.heads // max(ask.kv_heads, 1)
    require(ask.heads % ask.kv_heads == 0 and groups <= 64, op, f"{ask.heads} heads over {ask.kv_heads}")
    require(ask.mode in (0, 1, 2, 3, 4), op, f"sparse_mode 0 to 4, not {ask.mode}")
    if ask.mask is not None and ask.mode in (2, 3, 4):
        check_compressed(op, ask.mask)
    require(ask.mask is not None or ask.mode in (0, 1), op, f"sparse_mode {ask.mode} needs its mask")
    _check_pages(ask, k, v)


def _check_pages(ask: Question, k: Tensor, v: Tensor) -> None:
    op, table = ask.op, ask.table
    require(table is not None, op, "keys without pages are not simulated")
    assert table is not None
    require(table.dtype == torch.int32 and table.dim() == 2, op, "block_table int32 of two dimensions")
    require(ask.block in PAGE_SIZES, op, f"block_size of {PAGE_SIZES}, not {ask.block}")
    require(k.dim() in (3, 4) and v.dim() == k.dim(), op, "pages of three or four dimensions")
    at = 1 if k.dim() == 3 else 2
    require(k.shape[at] == v.shape[at] == ask.block, op, f"pages of {k.shape[at]} and block_size {ask.block}")
    width = k.shape[2] if k.dim() == 3 else k.shape[1] * k.shape[3]
    require(k.dim() == 4 or width < 65536, op, f"N * D below 65536, not {width}")
    require(ask.lengths is not None, op, "pages need the lengths of keys")
    lengths = ask.lengths or ()
    require(
        len(lengths) == len(table), op, f"{len(lengths)} lengths of keys beside {len(table)} rows of pages"
    )
    require(all(0 <= n <= table.shape[1] * ask.block for n in lengths), op, "lengths that block_table covers")
    require(bool(((table >= 0) & (table < len(k))).all()), op, f"pages from 0 to {len(k) - 1}")


def _queries(ask: Question, q: Tensor) -> Iterator[Tensor]:
    """[N, length, D] of each sequence."""
    if ask.layout == "TND":
        ends = list(ask.ends_q or ())
        rises = bool(ends) and ends == sorted(ends) and ends[-1] == len(q)
        require(rises, ask.op, f"TND: ends of queries that rise to {len(q)}, without a leading 0")
        require(len(ends) == len(ask.lengths or ()), ask.op, "as many ends of queries as lengths of keys")
        for start, stop in pairwise([0, *ends]):
            yield q[start:stop].transpose(0, 1)
    else:
        require(len(q) == len(ask.lengths or ()), ask.op, "a length of keys for each sequence")
        yield from (q if ask.layout == "BNSD" else q.transpose(1, 2))


def _gathered(ask: Question, pool: Tensor, pages: Tensor, length: int, heads: int) -> Tensor:
    """[heads, length, D] of one sequence. A kernel reads its last page whole and drops the rest."""
    chosen = pool[pages[: -(-length // ask.block)].long()]
    rows = chosen.transpose(1, 2).flatten(2) if chosen.dim() == 4 else chosen
    return split_heads(rows.flatten(0, 1)[:length], heads).transpose(0, 1)


def _attend(ask: Question, q: Tensor, k: Tensor, v: Tensor, ropes: tuple[Tensor, Tensor] | None) -> Tensor:
    assert ask.table is not None
    outputs = []
    q_ropes = list(_queries(ask, ropes[0])) if ropes else []
    for index, q_NQD in enumerate(_queries(ask, q)):
        length, pages = (ask.lengths or ())[index], ask.table[index]
        k_KSD = _gathered(ask, k, pages, length, ask.kv_heads)
        v_KSE = _gathered(ask, v, pages, length, ask.kv_heads)
        if ropes:
            rope = _gathered(ask, ropes[1], pages, length, ask.kv_heads)
            q_NQD, k_KSD = torch.cat([q_NQD, q_ropes[index]], -1), torch.cat([k_KSD, rope], -1)
        # With one query of each sequence the kernel heeds no sparse mode.
        mode, mask = (0, None) if ask.layout != "TND" and q_NQD.shape[1] == 1 else (ask.mode, ask.mask)
        keep = seen(ask.op, q_NQD.shape[1], length, mask, mode, ask.before, ask.after)
        out = softmax_attention(q_NQD, k_KSD, v_KSE, keep, ask.scale)[0]
        outputs.append(out.transpose(0, 1) if ask.layout in ("TND", "BSND") else out)
    whole = torch.cat(outputs) if ask.layout == "TND" else torch.stack(outputs)
    return whole.to(q.dtype).contiguous()


def fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None, actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None, block_table: Tensor | None = None,
    query_rope: Tensor | None = None, key_rope: Tensor | None = None, num_heads: int = 1, scale: float = 1.0,
    pre_tokens: int = LARGEST, next_tokens: int = LARGEST, input_layout: str = "BSH",
    num_key_value_heads: int = 0, sparse_mode: int = 0, inner_precise: int = 0, block_size: int = 0,
    antiquant_mode: int = 0, key_antiquant_mode: int = 0, value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of new queries over the pages of their sequences; the second result is a zero [1]."""
    op = "npu_fused_infer_attention_score"
    unused(op, pse_shift=pse_shift, softmax_lse_flag=softmax_lse_flag or None, query_rope=query_rope,
           key_rope=key_rope, **others)  # fmt: skip
    ask = Question(
        op=op, layout=input_layout, heads=num_heads, kv_heads=num_key_value_heads or num_heads, scale=scale,
        mask=atten_mask, mode=sparse_mode, before=pre_tokens, after=next_tokens, ends_q=actual_seq_lengths,
        lengths=actual_seq_lengths_kv, table=block_table, block=block_size,
    )  # fmt: skip
    _check(ask, query, key, value)
    require(key.shape == value.shape, op, f"keys and values of one shape, not {key.shape} and {value.shape}")
    return _attend(ask, query, key, value, None), torch.zeros(1)


def fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, *, query_rope: Tensor | None = None,
    key_rope: Tensor | None = None, pse_shift: Tensor | None = None, atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None, actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None, num_query_heads: int = 1, num_key_value_heads: int = 0,
    softmax_scale: float = 1.0, pre_tokens: int = LARGEST, next_tokens: int = LARGEST,
    input_layout: str = "BSH", sparse_mode: int = 0, block_size: int = 0, query_quant_mode: int = 0,
    key_quant_mode: int = 0, value_quant_mode: int = 0, inner_precise: int = 0,
    return_softmax_lse: bool = False, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with names of its own; with ropes it is latent attention: one key head of 512 and 64."""
    op = "npu_fused_infer_attention_score_v2"
    unused(op, pse_shift=pse_shift, return_softmax_lse=return_softmax_lse or None, **others)
    ask = Question(
        op=op, layout=input_layout, heads=num_query_heads, kv_heads=num_key_value_heads or num_query_heads,
        scale=softmax_scale, mask=atten_mask, mode=sparse_mode, before=pre_tokens, after=next_tokens,
        ends_q=actual_seq_qlen, lengths=actual_seq_kvlen, table=block_table, block=block_size,
    )  # fmt: skip
    require((query_rope is None) == (key_rope is None), op, "query_rope and key_rope come together")
    ropes = None if query_rope is None or key_rope is None else (query_rope, key_rope)
    if ropes:
        _check_latent(ask, query, key, *ropes)
    _check_v2(ask, query, key, value, bool(ropes))
    return _attend(ask, query, key, value, ropes), torch.zeros(1)


def _check_v2(ask: Question, q: Tensor, k: Tensor, v: Tensor, latent: bool) -> None:
    # Up to 128 heads share the one latent head.
    if latent:
        require(ask.kv_heads == 1, ask.op, f"one latent head, not {ask.kv_heads}")
    _check(ask, q, k, v) if not latent or ask.heads <= 64 else _check_pages(ask, k, v)
    require(k.shape == v.shape, ask.op, f"keys and values of one shape, not {k.shape} and {v.shape}")


def _check_latent(ask: Question, q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor) -> None:
    op = ask.op
    one_dtype(op, (q, k, q_rope, k_rope), HALVES)
    require(all(x.is_contiguous() for x in (q_rope, k_rope)), op, "contiguous ropes")
    require(q.shape[:-1] == q_rope.shape[:-1], op, "query_rope of the queries' shape but for the last")
    dims = q.shape[-1], q_rope.shape[-1]
    require(dims == (512, 64), op, f"latents of 512 and ropes of 64, not {dims}")
    require(ask.heads in ROPE_HEADS, op, f"heads of {ROPE_HEADS}, not {ask.heads}")


def scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *,
    compress_lens: Tensor | None = None, compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None, cache_mode: str | None = "PA_NZ",
) -> None:  # fmt: skip
    """Rows of key and value go to the rows of the pools that slot_mapping names."""
    op = "npu_scatter_pa_kv_cache"
    unused(op, compress_lens=compress_lens, compress_seq_offsets=compress_seq_offsets, seq_lens=seq_lens)
    require(
        cache_mode in (None, "Norm"), op, f"cache_mode {cache_mode!r} (the default) wants pools in NZ format"
    )
    one_dtype(op, (key, value, key_cache, value_cache), FLOATS)
    tensors = (key, value, key_cache, value_cache, slot_mapping)
    require(all(x.is_contiguous() for x in tensors), op, "contiguous tensors")
    require(slot_mapping.dtype in (torch.int32, torch.int64), op, "slot_mapping int32 or int64")
    require(key.dim() == value.dim() == 3 and key.shape[:2] == value.shape[:2], op, "[tokens, heads, dim]")
    for x, pool in ((key, key_cache), (value, value_cache)):
        require(pool.dim() == 4 and pool.shape[2:] == x.shape[1:], op, "pools [pages, block, heads, dim]")
    rows, places = slot_mapping.long(), key_cache.shape[0] * key_cache.shape[1]
    require(len(rows) == len(key), op, f"{len(rows)} places of {len(key)} tokens")
    inside = not len(rows) or (int(rows.min()) >= 0 and int(rows.max()) < places)
    require(inside, op, f"places from 0 to {places - 1}")
    require(len(set(rows.tolist())) == len(rows), op, "no place twice")
    key_cache.flatten(0, 1)[rows] = key
    value_cache.flatten(0, 1)[rows] = value


TABLE: Table = {
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": fused_infer_attention_score_v2,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
}
