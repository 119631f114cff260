"""flash-attn, torch's varlen attention and Transformer Engine as their documentation has them, for the CPU.

The signatures are those of flash-attn 2.8.3, torch 2.13 and Transformer Engine 2.18. Each refuses what the
package refuses (flash_api.cpp, varlen.py, dot_product_attention.py), and computes in float64, segment by
segment.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

STRICT = {"dtype": False}
"""With "dtype", only halves are taken, as the kernels do."""
CALLS: list[tuple[str, dict[str, Any]]] = []


def need(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def formula(
    q_QHD: Tensor, k_LKD: Tensor, v_LKE: Tensor, scale: float, causal: bool, window: tuple[int, int]
) -> Tensor:
    """One sequence; the query at i sees keys i + L - Q - left .. i + L - Q + right."""
    Q, H, _ = q_QHD.shape
    L, K = k_LKD.shape[:2]
    k, v = (x.double().repeat_interleave(H // K, 1) for x in (k_LKD, v_LKE))
    at = torch.arange(Q)[:, None] + L - Q
    keys = torch.arange(L)[None]
    left, right = window
    seen = torch.ones(Q, L, dtype=torch.bool)
    if left >= 0:
        seen &= keys >= at - left
    if causal or right >= 0:
        seen &= keys <= at + (0 if causal else right)
    scores = torch.einsum("qhd,lhd->hql", q_QHD.double(), k) * scale
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.where(seen.any(-1)[None, :, None], scores, torch.zeros_like(scores)).softmax(-1)
    weights = weights * seen.any(-1)[None, :, None]
    return torch.einsum("hql,lhe->qhe", weights, v).to(q_QHD.dtype)


def packed(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, used: Tensor | None,
    table: Tensor | None, scale: float, causal: bool, window: tuple[int, int],
) -> Tensor:  # fmt: skip
    outputs = [q.new_empty(0, q.shape[1], v.shape[-1])]
    spans = zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist()), strict=True)
    for index, ((a, b), (c, d)) in enumerate(spans):
        length = d - c if used is None else int(used[index])
        if table is None:
            keys, values = k[c : c + length], v[c : c + length]
        else:
            keys, values = (x[table[index].long()].flatten(0, 1)[:length] for x in (k, v))
        outputs.append(formula(q[a:b], keys, values, scale, causal, window))
    return torch.cat(outputs)


def check_kernel(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, *integers: Tensor | None) -> None:
    """What flash-attn's forward and backward refuse."""
    halves = (torch.float16, torch.bfloat16)
    need(not STRICT["dtype"] or q.dtype in halves, "FlashAttention only support fp16 and bf16 data type")
    need(k.dtype == q.dtype and v.dtype == q.dtype, "query, key and value must have the same dtype")
    need(q.shape[-1] == k.shape[-1] == v.shape[-1], "k and v must have the head size of q")
    need(q.shape[-1] <= 256 and q.shape[-1] % 8 == 0, "head_size should be a multiple of 8")
    need(q.shape[-2] % k.shape[-2] == 0, "number of heads in key/value must divide that of the query")
    need(all(x.stride(-1) == 1 for x in (q, k, v)), "input tensor must have contiguous last dimension")
    for one in integers:
        need(one is None or one.dtype == torch.int32, "lengths must have dtype int32")
        need(one is None or one.is_contiguous(), "lengths must be contiguous")
    if table is not None:
        need(table.dtype == torch.int32 and table.stride(-1) == 1, "block_table must have dtype torch.int32")
        need(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
        need(not (q.requires_grad or k.requires_grad), "pages have no backward pass")


def check_one_each(q: Tensor, heads_k: int, batch: int, most: int, window: tuple[int, int]) -> None:
    """With one query at most and grouped heads, the kernel views q as [batch, groups, ...]."""
    swapped = most == 1 and q.shape[1] > heads_k and window[0] < 0
    need(not swapped or q.shape[0] == batch, "shape is invalid for input: every sequence needs its query")


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    CALLS.append(("flash_attn_varlen_func", {"deterministic": deterministic, "pages": block_table}))
    need(dropout_p == 0.0 and softmax_scale is not None, "this test wants its own scale")
    check_kernel(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    need(len(lengths_q) > 0, "batch size must be positive")
    need(int(lengths_q.max()) <= max_seqlen_q and int(lengths_k.max()) <= max_seqlen_k, "a longer sequence")
    check_one_each(q, k.shape[-2], len(lengths_q), max_seqlen_q, window_size)
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, None, block_table, softmax_scale, causal, window_size)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None,
    num_splits: int = 0, return_softmax_lse: bool = False,
) -> Tensor:  # fmt: skip
    CALLS.append(("flash_attn_with_kvcache", {"pages": block_table}))
    assert isinstance(cache_seqlens, Tensor) and block_table is not None and softmax_scale is not None
    check_kernel(q, k_cache, v_cache, block_table, cache_seqlens)
    B, Q = q.shape[:2]
    need(q.dim() == 4 and block_table.shape[0] == B == len(cache_seqlens), "one row for each sequence")
    ends = torch.arange(0, (B + 1) * Q, Q, dtype=torch.int32)
    room = torch.arange(B + 1, dtype=torch.int32) * block_table.shape[1] * k_cache.shape[1]
    return packed(
        q.flatten(0, 1), k_cache, v_cache, ends, room, cache_seqlens, block_table, softmax_scale, causal,
        window_size,
    ).unflatten(0, (B, Q))  # fmt: skip


def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int,
    max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Tensor | None = None,
    block_table: Tensor | None = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    CALLS.append(("varlen_attn", {"pages": block_table}))
    assert cu_seq_k is not None and scale is not None, "flash-attn 2 wants it with pages too"
    heads = key.shape[2] if block_table is not None else key.shape[1]
    need(enable_gqa or query.shape[1] == heads, "try setting enable_gqa=True")
    check_kernel(query, key, value, block_table, cu_seq_q, cu_seq_k, seqused_k)
    need((block_table is None) == (seqused_k is None), "block_table requires seqused_k")
    need(cu_seq_q.shape == cu_seq_k.shape, "cu_seq_q and cu_seq_k must have the same shape")
    need(int(cu_seq_q.diff().max()) <= max_q and int(cu_seq_k.diff().max()) <= max_k, "a longer sequence")
    check_one_each(query, heads, len(cu_seq_q) - 1, max_q, window_size)
    causal = tuple(window_size) == (-1, 0)
    return packed(
        query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, scale, causal, tuple(window_size)
    )


class DotProductAttention(torch.nn.Module):
    def __init__(
        self, num_attention_heads: int, kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None, attention_dropout: float = 0.0, qkv_format: str = "sbhd",
        attn_mask_type: str = "causal", window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None, sequence_parallel: bool = False, tp_size: int = 1,
        get_rng_state_tracker: Any = None, tp_group: Any = None, layer_number: int | None = None,
        attention_type: str = "self", cp_group: Any = None, cp_global_ranks: Any = None,
        cp_stream: Any = None, cp_comm_type: str = "p2p", softmax_scale: float | None = None,
        softmax_type: str = "vanilla", return_max_logit: bool | None = False, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.sizes = (num_attention_heads, num_gqa_groups, *sizes)
        self.scale = softmax_scale
        self.deterministic = torch.are_deterministic_algorithms_enabled()

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Any = None,
        qkv_format: str | None = None, cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None, cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None, attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None, bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False, core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None, alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True, inference_params: Any = None, pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False, num_splits: int | None = 1,
    ) -> Tensor:  # fmt: skip
        CALLS.append(("DotProductAttention", {"deterministic": self.deterministic, "mask": attn_mask_type}))
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None and attn_mask_type is not None
        assert qkv_format == "thd" and max_seqlen_q is not None and max_seqlen_kv is not None
        need("padding" in attn_mask_type, "attention mask type must be padding or padding_causal for thd")
        need(cu_seqlens_q.shape == cu_seqlens_kv.shape, "both must have shape [batch_size + 1]")
        need(cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32, "both must be in dtype torch.int32")
        given = (query_layer.shape[1], key_layer.shape[1], query_layer.shape[2], value_layer.shape[2])
        need(given == self.sizes, f"a module for {self.sizes} was given {given}")
        lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_kv.diff()
        need(int(lengths_q.max()) <= max_seqlen_q and int(lengths_k.max()) <= max_seqlen_kv, "longer ones")
        causal = "causal" in attn_mask_type
        # Without "bottom_right", the diagonal starts at the top left.
        need(not causal or "bottom_right" in attn_mask_type or torch.equal(lengths_q, lengths_k), "alignment")
        return packed(
            query_layer, key_layer, value_layer, cu_seqlens_q, cu_seqlens_kv, None, None, self.scale or 0.0,
            causal, (-1, -1),
        ).flatten(1)  # fmt: skip


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


@contextmanager
def stands_for_vendors() -> Iterator[None]:
    """The formulas under the vendors' names, for imports inside."""
    made = {
        "flash_attn": _module(
            "flash_attn",
            flash_attn_varlen_func=flash_attn_varlen_func,
            flash_attn_with_kvcache=flash_attn_with_kvcache,
        ),
        "transformer_engine": _module("transformer_engine"),
        "transformer_engine.pytorch": _module(
            "transformer_engine.pytorch", DotProductAttention=DotProductAttention
        ),
    }
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def adapter(name: str) -> ModuleType:
    """A module of the plugin over the formulas, apart from the one that other tests may import."""
    full = f"grpo_cuda.{name}"
    kept = sys.modules.pop(full, None)
    with stands_for_vendors():
        loaded = importlib.import_module(full)
    del sys.modules[full]
    if kept is not None:
        sys.modules[full] = kept
    if name == "varlen":
        vars(loaded)["varlen_attn"] = varlen_attn
    return loaded
