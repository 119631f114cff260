"""Routing, permutation and grouped products of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .casts import dtype_of
from .checks import FLOATS, Table, one_dtype, pieces, require, unused, wide

INNER_LIMIT = 65536


def moe_gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None, k_group: int = 1, group_count: int = 1, group_select_mode: int = 0,
    renorm: int = 0, norm_type: int = 0, out_flag: bool = False, routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights [T, k], ids int32 [T, k] and the scores float32 [T, X]; equal scores go to the lowest id."""
    op = "npu_moe_gating_top_k"
    unused(op, input_ids=input_ids, tid2eid=tid2eid)
    one_dtype(op, (x,) if bias is None else (x, bias), FLOATS)
    require(x.dim() == 2 and x.shape[1] <= 2048, op, f"[tokens, experts to 2048], not {list(x.shape)}")
    T, X = x.shape
    require(bias is None or bias.shape == (X,), op, "a bias of each expert")
    require(renorm == 0 and norm_type in (0, 1) and group_select_mode in (0, 1), op, "renorm 0, modes 0 or 1")
    require(
        group_count > 0 and X % group_count == 0 and 1 <= k_group <= group_count, op, "groups that share out"
    )
    each = X // group_count
    require(group_count == 1 or each > 2, op, f"groups of more than two experts, not {each}")
    require(-(-each // 32) * 32 * group_count <= 2048, op, "groups padded to 32 within 2048")
    require(1 <= k <= each * k_group, op, f"k from 1 to {each * k_group}, not {k}")
    scores = torch.sigmoid(wide(x)) if norm_type == 1 else torch.softmax(wide(x), -1)
    choice = scores if bias is None else scores + wide(bias)
    if group_count > 1:
        grouped = choice.view(T, group_count, each)
        best = grouped.topk(2 if group_select_mode == 1 else 1, -1).values.sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :k_group]
        open_groups = torch.zeros(T, group_count, dtype=torch.bool).scatter_(1, kept, True)
        choice = grouped.masked_fill(~open_groups[..., None], -torch.inf).view(T, X)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, ids)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    shown = scores if out_flag else torch.empty(0)
    return (weights * routed_scaling_factor).to(x.dtype), ids.to(torch.int32), shown


def _places(indices: Tensor) -> tuple[Tensor, Tensor]:
    """The order of (token, choice) pairs by expert, and where each of them went."""
    order = indices.reshape(-1).argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return order, places


def moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of tokens by expert, and int32 places of the pairs."""
    op = "npu_moe_token_permute"
    one_dtype(op, (tokens,), FLOATS)
    require(tokens.dim() == 2 and indices.dim() in (1, 2), op, "tokens [T, C], indices [T] or [T, k]")
    require(indices.dtype in (torch.int32, torch.int64), op, f"indices int32 or int64, not {indices.dtype}")
    require(len(indices) == len(tokens), op, f"{len(indices)} rows of indices of {len(tokens)} tokens")
    require(not padded_mode and not num_out_tokens, op, "neither padded_mode nor num_out_tokens is simulated")
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    require(top_k <= 512, op, f"top-k to 512, not {top_k}")
    order, places = _places(indices)
    return tokens.index_select(0, order // top_k), places.to(torch.int32)


def moe_token_permute_grad(
    tokens: Tensor, grad_permuted_tokens: Tensor, indices: Tensor, sorted_indices: Tensor,
    padded_mode: bool = False,
) -> Tensor:  # fmt: skip
    """Each token's gradient is the sum over its choices."""
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    return moe_token_permute_grad_v2(grad_permuted_tokens, sorted_indices, len(tokens), tokens.dtype, top_k)


def moe_token_permute_grad_v2(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, tokens_size_0: int, tokens_dtype: Any,
    num_topK: int, padded_mode: bool = False,
) -> Tensor:  # fmt: skip
    """The same from sizes."""
    rows = wide(grad_permuted_tokens).index_select(0, sorted_indices.long())
    return rows.view(tokens_size_0, num_topK, -1).sum(1).to(dtype_of(tokens_dtype))


def moe_token_unpermute(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Each token is the sum of its rows, times probs where they are given."""
    op = "npu_moe_token_unpermute"
    one_dtype(op, (permuted_tokens,), FLOATS)
    require(permuted_tokens.dim() == 2 and sorted_indices.dim() == 1, op, "rows [R, C], sorted_indices [R]")
    require(sorted_indices.dtype == torch.int32, op, f"sorted_indices int32, not {sorted_indices.dtype}")
    require(len(sorted_indices) == len(permuted_tokens), op, "a place for each row")
    require(
        not padded_mode and restore_shape is None, op, "neither padded_mode nor restore_shape is simulated"
    )
    if probs is None:
        return permuted_tokens.index_select(0, sorted_indices.long())
    require(probs.dim() == 2 and probs.dtype in FLOATS, op, "probs of two dimensions, floating")
    require(probs.numel() == len(sorted_indices) and probs.shape[1] <= 512, op, "probs [T, k], k to 512")
    rows = wide(permuted_tokens).index_select(0, sorted_indices.long())
    return (rows.view(*probs.shape, -1) * wide(probs)[..., None]).sum(1).to(permuted_tokens.dtype)


def moe_token_unpermute_saving(
    permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None, padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What autograd calls: the result, and the rows that its gradient needs."""
    out = moe_token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return out, permuted_tokens.clone()


def moe_token_unpermute_grad(
    permuted_tokens: Tensor, grad_unpermuted_tokens: Tensor, sorted_indices: Tensor,
    probs: Tensor | None = None, padded_mode: bool = False, restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the rows and of probs."""
    places, up = sorted_indices.long(), wide(grad_unpermuted_tokens)
    top_k = 1 if probs is None else probs.shape[1]
    spread = up.repeat_interleave(top_k, 0)
    rows = torch.zeros(permuted_tokens.shape, dtype=torch.float32)
    if probs is None:
        return rows.index_copy_(0, places, spread).to(permuted_tokens.dtype), torch.empty(0)
    rows.index_copy_(0, places, spread * wide(probs).reshape(-1, 1))
    picked = wide(permuted_tokens).index_select(0, places)
    return rows.to(permuted_tokens.dtype), (picked * spread).sum(1).view(probs.shape).to(probs.dtype)


def moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens: Tensor, sorted_indices: Tensor, permuted_tokens_size_0: int,
    permuted_tokens_dtype: Any, probs: Tensor | None = None, padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None, permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from sizes; the rows are only there with probs."""
    if permuted_tokens is None or not permuted_tokens.numel():
        size = permuted_tokens_size_0, grad_unpermuted_tokens.shape[1]
        permuted_tokens = torch.zeros(size, dtype=dtype_of(permuted_tokens_dtype))
    return moe_token_unpermute_grad(permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs)


def grouped_matmul(
    x: Sequence[Tensor], weight: Sequence[Tensor], *, bias: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None, split_item: int | None = 0, group_type: int | None = None,
    group_list_type: int | None = 0, act_type: int | None = 0, tuning_config: Sequence[int] | None = None,
    output_dtype: Any = None, **others: Any,
) -> list[Tensor]:  # fmt: skip
    """One product a group: rows of x by its own weight (group_type 0), or stretches of the sum (2)."""
    op = "npu_grouped_matmul"
    for name, value in {"bias": bias, "output_dtype": output_dtype, **others}.items():
        require(not value, op, f"{name} is not simulated")
    require(len(x) == len(weight) == 1, op, "lists of one tensor each are simulated")
    (left,), (right,) = x, weight
    one_dtype(op, (left, right), FLOATS)
    require(not act_type, op, "act_type goes with quantized operands")
    require(split_item in (2, 3), op, f"one result: split_item 2 or 3, not {split_item}")
    require(group_type in (0, 2), op, f"group_type 0 or 2, not {group_type}")
    require(max(left.shape[-1], right.shape[-1]) < INNER_LIMIT, op, f"last dimensions below {INNER_LIMIT}")
    counts = _counts(op, group_list, group_list_type)
    if group_type == 0:
        require(left.dim() == 2 and right.dim() == 3, op, "x of two and weight of three dimensions")
        require(left.is_contiguous(), op, "x is not transposed where its rows are grouped")
        fits = left.shape[1] == right.shape[1] and len(counts) == len(right) and sum(counts) == len(left)
        require(fits, op, f"groups {counts} of {list(left.shape)} by {list(right.shape)}")
        products = [wide(a) @ wide(b) for a, b in zip(pieces(left, counts), right, strict=True)]
        return [torch.cat(products).to(left.dtype)]
    require(left.dim() == right.dim() == 2, op, "x and weight of two dimensions")
    fits = left.shape[1] == right.shape[0] == sum(counts)
    require(fits, op, f"groups {counts} of {list(left.shape)} by {list(right.shape)}")
    pairs = zip(pieces(left, counts, 1), pieces(right, counts), strict=True)
    return [torch.stack([wide(a) @ wide(b) for a, b in pairs]).to(left.dtype)]


def _counts(op: str, group_list: Tensor | None, kind: int | None) -> list[int]:
    require(group_list is not None, op, "a group_list")
    assert group_list is not None
    require(group_list.dtype == torch.int64, op, f"group_list int64, not {group_list.dtype}")
    require(group_list.dim() == 1 and len(group_list) <= 1024, op, "a group_list of up to 1024 numbers")
    require(kind in (0, 1), op, f"group_list_type 0 or 1, not {kind}")
    require(kind == 0 or len(group_list) > 1, op, "more than one group where they are counts")
    counts: list[int] = (
        group_list if kind == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    ).tolist()
    require(min(counts, default=0) >= 0, op, "no group of less than nothing")
    return counts


TABLE: Table = {
    "npu_moe_gating_top_k": moe_gating_top_k,
    "npu_moe_token_permute": moe_token_permute,
    "npu_moe_token_permute_grad": moe_token_permute_grad,
    "npu_moe_token_permute_grad_v2": moe_token_permute_grad_v2,
    "npu_moe_token_unpermute": moe_token_unpermute,
    "_npu_moe_token_unpermute": moe_token_unpermute_saving,
    "npu_moe_token_unpermute_grad": moe_token_unpermute_grad,
    "npu_moe_token_unpermute_grad_v2": moe_token_unpermute_grad_v2,
    "npu_grouped_matmul": grouped_matmul,
}
