"""`npu_fusion_attention_v3`, the form that torch's own scaled dot product attention becomes on an NPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import Table
from .fusion import LARGEST, OP, fusion_attention, fusion_attention_grad


def _host(ends: Tensor | None) -> list[int] | None:
    return None if ends is None else [int(end) for end in ends.tolist()]


def fusion_attention_v3(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, pse: Tensor | None = None,
    padding_mask: Tensor | None = None, atten_mask: Tensor | None = None, scale: float = 1.0,
    keep_prob: float = 1.0, pre_tockens: int = LARGEST, next_tockens: int = LARGEST, inner_precise: int = 0,
    prefix: Sequence[int] | None = None, actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None, sparse_mode: int = 0, gen_mask_parallel: bool = True,
    sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """As the first form; lengths, seed and offset are tensors."""
    out = fusion_attention(
        query, key, value, head_num, input_layout, pse, padding_mask, atten_mask, scale, keep_prob,
        pre_tockens, next_tockens, inner_precise, prefix, _host(actual_seq_qlen), _host(actual_seq_kvlen),
        sparse_mode, gen_mask_parallel, sync, softmax_layout, sink,
    )  # fmt: skip
    return (*out[:4], torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def fusion_attention_grad_v3(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    pse: Tensor | None = None, padding_mask: Tensor | None = None, atten_mask: Tensor | None = None,
    softmax_max: Tensor | None = None, softmax_sum: Tensor | None = None, softmax_in: Tensor | None = None,
    attention_in: Tensor | None = None, scale_value: float = 1.0, keep_prob: float = 1.0,
    pre_tockens: int = LARGEST, next_tockens: int = LARGEST, inner_precise: int = 0,
    seed: Tensor | None = None, offset: Tensor | None = None, prefix: Sequence[int] | None = None,
    actual_seq_qlen: Tensor | None = None, actual_seq_kvlen: Tensor | None = None, sparse_mode: int = 0,
    gen_mask_parallel: bool = True, sync: bool = False, softmax_layout: str = "", sink: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key and value."""
    return fusion_attention_grad(
        query, key, value, dy, head_num, input_layout, pse=pse, padding_mask=padding_mask,
        atten_mask=atten_mask, softmax_max=softmax_max, softmax_sum=softmax_sum, attention_in=attention_in,
        scale_value=scale_value, keep_prob=keep_prob, pre_tockens=pre_tockens, next_tockens=next_tockens,
        prefix=prefix, actual_seq_qlen=_host(actual_seq_qlen), actual_seq_kvlen=_host(actual_seq_kvlen),
        sparse_mode=sparse_mode, sink=sink,
    )  # fmt: skip


TABLE: Table = {f"{OP}_v3": fusion_attention_v3, f"{OP}_grad_v3": fusion_attention_grad_v3}
