"""The ops of torch_npu that the plugin calls, by the vendor's documented formulas and limits, on the CPU.

Not the vendor's code: it shows that the plugin's calls mean what the contracts ask, and nothing about an
NPU's numbers. What torch_npu has no autograd formula for gives no gradient here either.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

STRICT = {"heads": True}
"""Whether sizes of heads are held to the documented ones; the shared checks use smaller ones."""
HALVES = (torch.bfloat16, torch.float16)
LARGEST = 2147483647


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _softmax_attention(q_QND: Tensor, k_SKD: Tensor, v_SKE: Tensor, seen_QS: Tensor, scale: float) -> Tensor:
    assert bool(seen_QS.any(-1).all()), "a row may not be masked altogether"
    groups = q_QND.shape[1] // k_SKD.shape[1]
    k_SND, v_SNE = (x.repeat_interleave(groups, 1) for x in (k_SKD, v_SKE))
    scores = torch.einsum("qnd,snd->nqs", _wide(q_QND), _wide(k_SND)) * scale
    weights = scores.masked_fill(~seen_QS, -torch.inf).softmax(-1)
    return torch.einsum("nqs,sne->qne", weights, _wide(v_SNE)).to(q_QND.dtype)


def _seen(queries: int, keys: int, mask: Tensor | None, mode: int, before: int, after: int) -> Tensor:
    """True where a key is kept; aligned at the end of both."""
    if mask is None:
        return torch.ones(queries, keys, dtype=torch.bool)
    assert mask.shape == (2048, 2048) and mask.dtype == torch.bool
    assert torch.equal(mask, torch.triu(torch.ones_like(mask), 1)), "True is masked, above the diagonal"
    assert mode in (3, 4), "the plugin uses these two"
    ahead = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    if mode == 3:
        return ahead <= 0
    return (ahead <= after) & (ahead >= -before)


def _ends(lengths: Sequence[int], total: int) -> list[int]:
    assert isinstance(lengths, list) and all(type(end) is int for end in lengths)
    assert lengths == sorted(lengths) and lengths[-1] == total, "ends without the leading 0"
    assert len(lengths) <= 1024
    return [0, *lengths]


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: None = None,
    padding_mask: None = None, atten_mask: Tensor | None = None, scale: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = LARGEST, next_tockens: int = LARGEST, inner_precise: int = 0, prefix: None = None,
    actual_seq_qlen: Sequence[int] = (), actual_seq_kvlen: Sequence[int] = (), sparse_mode: int = 0,
    gen_mask_parallel: bool = True, sync: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    assert input_layout == "TND" and keep_prob == 1.0
    assert query.dtype == key.dtype == value.dtype in (*HALVES, torch.float32)
    assert query.shape[1] == head_num <= 256 and head_num % key.shape[1] == 0
    assert query.shape[2] == key.shape[2] >= value.shape[2] and query.shape[2] <= 768
    q_ends, k_ends = _ends(actual_seq_qlen, len(query)), _ends(actual_seq_kvlen, len(key))
    outputs = []
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        if q0 < q1:
            seen = _seen(q1 - q0, k1 - k0, atten_mask, sparse_mode, pre_tockens, next_tockens)
            outputs.append(_softmax_attention(query[q0:q1], key[k0:k1], value[k0:k1], seen, scale))
    return torch.cat(outputs), None, None, None, 0, 0, 0


def _pages(cache: Tensor, heads: int, table: Tensor, length: int, block_size: int) -> Tensor:
    assert block_size == cache.shape[1] == 128 and cache.dim() == 3 and cache.is_contiguous()
    assert table.dtype == torch.int32 and table.dim() == 1
    assert length <= table.shape[0] * block_size and int(table.min()) >= 0
    rows = cache[table.long()].flatten(0, 1)[:length]
    return rows.view(length, heads, -1)


@torch.no_grad()
def npu_fused_infer_attention_score(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None, actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor, num_heads: int = 1, scale: float = 1.0, input_layout: str = "BSH",
    num_key_value_heads: int = 0, sparse_mode: int = 0, block_size: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert query.is_contiguous() and query.shape[1] == num_heads
    assert num_heads // num_key_value_heads <= 64 and key.shape[2] < 65536
    assert actual_seq_lengths_kv is not None and len(actual_seq_lengths_kv) == len(block_table)
    if STRICT["heads"]:
        assert query.dtype in HALVES and key.shape == value.shape and query.shape[-1] % 16 == 0
    if input_layout == "BNSD":
        assert query.dim() == 4 and query.shape[2] == 1 and atten_mask is None
        q_ends, q_TND = list(range(len(query) + 1)), query.squeeze(2)
    else:
        assert input_layout == "TND" and sparse_mode == 3 and atten_mask is not None
        q_ends, q_TND = _ends(actual_seq_lengths or [], len(query)), query
    outputs = []
    for index, length in enumerate(actual_seq_lengths_kv):
        q_QND = q_TND[q_ends[index] : q_ends[index + 1]]
        if len(q_QND):
            k, v = (_pages(x, num_key_value_heads, block_table[index], length, block_size)
                    for x in (key, value))  # fmt: skip
            seen = _seen(len(q_QND), length, atten_mask, sparse_mode, LARGEST, 0)
            outputs.append(_softmax_attention(q_QND, k, v, seen, scale))
    out = torch.cat(outputs)
    return (out.unsqueeze(2) if input_layout == "BNSD" else out), torch.zeros(1)


@torch.no_grad()
def npu_fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, *, query_rope: Tensor, key_rope: Tensor,
    actual_seq_kvlen: list[int], block_table: Tensor, num_query_heads: int, num_key_value_heads: int,
    softmax_scale: float, input_layout: str, block_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The latent form: one key head of L and R; values are the latents."""
    assert input_layout == "BNSD" and num_key_value_heads == 1 and key.data_ptr() == value.data_ptr()
    assert query.shape[:3] == query_rope.shape[:3] and query.shape[1] == num_query_heads
    assert query.is_contiguous() and query_rope.is_contiguous() and query.dtype == query_rope.dtype
    if STRICT["heads"]:
        assert query.dtype in HALVES and query.shape[-1] == 512 and query_rope.shape[-1] == 64
    outputs = []
    for index, length in enumerate(actual_seq_kvlen):
        latent = _pages(key, 1, block_table[index], length, block_size)
        rope = _pages(key_rope, 1, block_table[index], length, block_size)
        q = torch.cat([query[index], query_rope[index]], -1).transpose(0, 1)
        seen = torch.ones(1, length, dtype=torch.bool)
        outputs.append(_softmax_attention(q, torch.cat([latent, rope], -1), latent, seen, softmax_scale))
    return torch.cat(outputs).unsqueeze(2), torch.zeros(1)


@torch.no_grad()
def npu_scatter_pa_kv_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *,
    cache_mode: str = "PA_NZ",
) -> None:  # fmt: skip
    assert cache_mode == "Norm" and slot_mapping.dtype == torch.int32
    assert key.dtype == value.dtype == key_cache.dtype == value_cache.dtype
    assert all(x.is_contiguous() for x in (key, value, key_cache, value_cache))
    assert key.shape[:2] == value.shape[:2] and key.dim() == 3 and key_cache.dim() == 4
    assert len(set(slot_mapping.tolist())) == len(slot_mapping)
    key_cache.flatten(0, 1)[slot_mapping.long()] = key
    value_cache.flatten(0, 1)[slot_mapping.long()] = value


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype and 2 <= input.dim() <= 8
    wide = _wide(input)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * _wide(gamma)).to(input.dtype), rstd


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    batch, length, heads, dim = input.shape
    assert dim % 2 == 0 and dim < 896 and batch * heads < 1000 and input.dtype == r1.dtype == r2.dtype
    assert r1.shape == r2.shape == (1, length, 1, dim)
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        assert rotary_mode == "interleave"
        turned = torch.stack([-input[..., 1::2], input[..., ::2]], -1).flatten(-2)
    return r1 * input + r2 * turned


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    gate, up = _wide(input).chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


@torch.no_grad()
def npu_grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, split_item: int, group_type: int,
    group_list_type: int,
) -> list[Tensor]:  # fmt: skip
    (left,), (right,) = x, weight
    assert left.dtype == right.dtype and group_list.dtype == torch.int64 and group_list_type == 1
    assert len(group_list) > 1 and int(group_list.min()) >= 0
    counts = group_list.tolist()
    if group_type == 0:
        assert split_item == 2 and left.shape[1] == right.shape[1] and sum(counts) == len(left)
        parts = zip(left.split(counts), right.unbind(0), strict=True)
        return [torch.cat([_wide(a) @ _wide(b) for a, b in parts]).to(left.dtype)]
    assert group_type == 2 and split_item == 3 and left.shape[1] == right.shape[0] == sum(counts)
    parts = zip(left.split(counts, 1), right.split(counts), strict=True)
    return [torch.stack([_wide(a) @ _wide(b) for a, b in parts]).to(left.dtype)]


@torch.no_grad()
def npu_moe_gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, k_group: int = 1, group_count: int = 1,
    group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0, out_flag: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, X = x.shape
    assert renorm == 0 and (bias is None or bias.dtype == x.dtype) and 1 <= k <= X // group_count * k_group
    norm = torch.sigmoid(x) if norm_type == 1 else torch.softmax(x, -1)
    choice = norm if bias is None else norm + bias
    if group_count > 1:
        assert group_select_mode == 1
        grouped = choice.view(T, group_count, -1)
        worth = grouped.topk(min(2, grouped.shape[2]), -1).values.sum(-1)
        best = worth.sort(dim=-1, descending=True, stable=True).indices[:, :k_group]
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).view(T, X)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return norm.gather(1, ids), ids.to(torch.int32), norm


def npu_moe_token_permute(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    assert indices.dtype == torch.int32 and indices.dim() == 2
    order = indices.reshape(-1).argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return tokens.index_select(0, order // indices.shape[1]), places.to(torch.int32)


def npu_moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor) -> Tensor:
    assert sorted_indices.dtype == torch.int32 and len(sorted_indices) == probs.numel()
    rows = _wide(permuted_tokens).index_select(0, sorted_indices.long())
    return (rows.view(*probs.shape, -1) * _wide(probs)[..., None]).sum(1).to(permuted_tokens.dtype)


@torch.no_grad()
def npu_apply_adam_w(
    beta1_power: float, beta2_power: float, lr: float, weight_decay: float, beta1: float, beta2: float,
    epsilon: float, grad: Tensor, max_grad_norm: None, amsgrad: bool, maximize: bool, *,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    var, m, v = out
    assert grad.dtype == var.dtype == m.dtype == v.dtype and not amsgrad and not maximize
    m.copy_(beta1 * m + (1 - beta1) * grad)
    v.copy_(beta2 * v + (1 - beta2) * grad * grad)
    m_hat, v_hat = m / (1 - beta1_power * beta1), v / (1 - beta2_power * beta2)
    var.copy_(var - lr / (v_hat.sqrt() + epsilon) * m_hat - lr * weight_decay * var)
    return out
