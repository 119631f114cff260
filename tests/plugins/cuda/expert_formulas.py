"""Transformer Engine's MoE functions, flash-linear-attention, causal-conv1d and FlashMLA for the CPU.

Signatures are those of Transformer Engine 2.18, flash-linear-attention 0.5.2, causal-conv1d 1.5 and FlashMLA
of 2026 (and of 2025 where it differs). Each refuses what the package refuses or gets wrong, and computes by
the formula.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import attention_formulas
import torch
from attention_formulas import formula, need
from torch import Tensor

from grpo_conformance.ops.delta_oracles import conv, delta_rule

CALLS: list[tuple[str, dict[str, Any]]] = []
STRICT = {"dtype": False, "sizes": False}
"""Whether kernels take their own dtypes and sizes alone; the shared checks use others."""


def moe_permute(
    inp: Tensor, routing_map: Tensor, num_out_tokens: int, max_token_num: int = -1, map_type: str = "mask"
) -> tuple[Tensor, Tensor]:
    need(map_type == "mask", "the index form adds in the rows' dtype")
    need(routing_map.dtype == torch.int32 and routing_map.shape[0] == inp.shape[0], "int32 [tokens, experts]")
    need(num_out_tokens > 0 and num_out_tokens == int(routing_map.sum()), "num_out_tokens > 0")
    expert, token = routing_map.t().nonzero(as_tuple=True)
    return inp.index_select(0, token), torch.stack([token, expert])


def moe_unpermute(
    inp: Tensor, row_id_map: Tensor, merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None, map_type: str = "mask", probs: Tensor | None = None,
    pad_offsets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    need(map_type == "mask" and probs is None and pad_offsets is None, "the mask form, merging_probs")
    assert merging_probs is not None and restore_shape is not None
    token, expert = row_id_map
    wide = inp.to(torch.promote_types(inp.dtype, torch.float32))
    weighed = wide * merging_probs[token, expert].to(wide.dtype)[:, None]
    return wide.new_zeros(restore_shape).index_add(0, token, weighed).to(inp.dtype)


class GroupedLinear(torch.nn.Module):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        get_rng_state_tracker: Any = None, rng_tracker_name: str | None = None, init_method: Any = None,
        bias: bool = True, return_bias: bool = False, params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None, device: torch.device | str = "cuda", ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False, ub_name: str | None = None, delay_wgrad_compute: bool = False,
        save_original_input: bool = False, single_grouped_weight: bool = False,
        single_grouped_bias: bool = False, name: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        need(not bias and str(device) == "meta" and params_dtype is not None, "a shell without memory")
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.fused = fuse_wgrad_accumulation
        for x in range(num_gemms):
            shape = (out_features, in_features)
            weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
            self.register_parameter(f"weight{x}", weight)

    def forward(
        self, inp: Tensor, m_splits: list[int] | Tensor, is_first_microbatch: bool | None = None
    ) -> Tensor:
        CALLS.append(("GroupedLinear", {"m_splits": m_splits}))
        # A list up to 2.16; later releases take it and make a tensor of it.
        need(isinstance(m_splits, list) and len(m_splits) == self.num_gemms, "number of splits")
        need(sum(m_splits) == inp.shape[0] and inp.is_contiguous(), "splits add up to the rows")
        weights = [getattr(self, f"weight{x}") for x in range(self.num_gemms)]
        need(
            all(w.device == inp.device and w.dtype == inp.dtype for w in weights),
            "weights of the input's kind",
        )
        out: Tensor = _GroupedLinear.apply(inp, m_splits, self.fused, *weights)
        return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, m_splits: list[int], fused: bool, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(inp, *weights)
        ctx.m_splits, ctx.weights = m_splits, weights if fused else None
        parts = inp.split(m_splits)
        return torch.cat([part @ w.t() for part, w in zip(parts, weights, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inp, *weights = ctx.saved_tensors
        rows, slopes = inp.split(ctx.m_splits), grads[0].split(ctx.m_splits)
        dgrad = torch.cat([g @ w for g, w in zip(slopes, weights, strict=True)])
        if ctx.weights is None:
            return dgrad, None, None, *(g.t() @ x for g, x in zip(slopes, rows, strict=True))
        for weight, g, x in zip(ctx.weights, slopes, rows, strict=True):
            weight.main_grad += g.float().t() @ x.float()
        return dgrad, None, None, *(None for _ in weights)


def _check_packed(cu_seqlens: Tensor, cu_seqlens_cpu: Tensor, *tokens: Tensor) -> list[int]:
    need(cu_seqlens.dtype == torch.int64 and torch.equal(cu_seqlens, cu_seqlens_cpu), "LongTensors alike")
    need(all(x.shape[0] == 1 for x in tokens), "batch size 1 with cu_seqlens")
    lengths: list[int] = cu_seqlens.diff().tolist()
    need(min(lengths) > 0, "0.5.0 would number the sequences after an empty one wrongly")
    return lengths


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False, state_v_first: bool = False, cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, cp_context: Any = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert not kwargs and scale is not None and cu_seqlens is not None and cu_seqlens_cpu is not None
    lengths = _check_packed(cu_seqlens, cu_seqlens_cpu, q, k, v, g, beta)
    need(not STRICT["dtype"] or q.dtype in (torch.bfloat16, torch.float16), "tf32 is not float32")
    need(v.shape[2] % q.shape[2] == 0 and q.shape[3] <= 256, "sizes of heads")
    need(initial_state is None or initial_state.shape[0] == len(lengths), "one initial state a sequence")
    wide = (x[0].double() for x in (q, k, v, g, beta))
    o, last = delta_rule(*wide, None if initial_state is None else initial_state.double(), lengths, scale)
    return o.to(v.dtype)[None], last.float() if output_final_state else None


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, gk: Tensor | None = None,
    gv: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, use_gate_in_kernel: bool = False, A_log: Tensor | None = None,
    dt_bias: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert g is not None and beta is not None and initial_state is not None and scale is not None
    assert gk is None and gv is None and cu_seqlens is None and output_final_state
    need(q.shape[1] == 1, "one token of each sequence")
    flat = (x[:, 0].double() for x in (q, k, v, g, beta))
    o, last = delta_rule(*flat, initial_state.double(), [1] * len(q), scale)
    return o.to(v.dtype)[:, None], last.float()


def causal_conv1d(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool | None = False,
    activation: str | None = None, backend: str | None = "triton", cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None, chunk_indices: Tensor | None = None, cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    assert weight is not None and cu_seqlens is not None and cu_seqlens_cpu is not None
    assert not kwargs and activation == "silu" and bias is None and residual is None
    lengths = _check_packed(cu_seqlens, cu_seqlens_cpu, x)
    state = None
    if initial_state is not None:
        need(initial_state.shape == (len(lengths), *weight.shape), "initial_state is [N, D, W]")
        # The oldest of W inputs has no weight.
        state = initial_state[..., 1:].double()
    y, _ = conv(x[0].double(), weight.double(), state, lengths)
    return y.to(x.dtype)[None], None


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert conv_state_indices is not None and activation == "silu" and bias is None and cache_seqlens is None
    need(conv_state_indices.dtype == torch.int32, "conv_state_indices must be int32")
    need(2 <= weight.shape[1] <= 4, "causal_conv1d only supports width between 2 and 4")
    need(conv_state.shape[1:] == (x.shape[1], weight.shape[1] - 1), "state_len >= width - 1")
    slots = conv_state_indices.long()
    window = torch.cat([conv_state[slots], x[..., None]], -1)
    conv_state[slots] = window[..., 1:]
    total = (window.double() * weight.double()).sum(-1)
    return (total / (1 + torch.exp(-total))).to(x.dtype)


class SchedMeta(SimpleNamespace):
    """FlashMLA's record of 2026: filled by the first call, then held against the others."""


def flash_mla_of(year: int) -> ModuleType:
    """FlashMLA with the interface of that year."""

    def get_mla_metadata(*args: Any) -> tuple[Any, Any]:
        cache_seqlens, heads_per_key, heads_k = args
        CALLS.append(("get_mla_metadata", {}))
        need(cache_seqlens.dtype == torch.int32 and heads_k == 1, "int32 lengths, one key head")
        if year >= 2026:
            return SchedMeta(seen=None), None
        return cache_seqlens.clone(), torch.tensor([heads_per_key])

    def flash_mla_with_kvcache(
        q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
        tile_scheduler_metadata: Any, num_splits: Any = None, softmax_scale: float | None = None,
        causal: bool = False, is_fp8_kvcache: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert softmax_scale is not None and not causal
        if year >= 2026:
            need(isinstance(tile_scheduler_metadata, SchedMeta) and num_splits is None, "its own record")
            seen, now = tile_scheduler_metadata.seen, (q.shape, cache_seqlens.tolist())
            need(seen in (None, now), "the record is for one set of lengths")
            tile_scheduler_metadata.seen = now
        else:
            need(torch.equal(tile_scheduler_metadata, cache_seqlens), "metadata of these lengths")
        need(block_table.dtype == cache_seqlens.dtype == torch.int32 and q.is_contiguous(), "int32")
        need(k_cache.shape[1:3] == (64, 1) and k_cache.is_contiguous(), "pages of 64, one head")
        need(not STRICT["sizes"] or (q.shape[-1], head_dim_v) == (576, 512), "576 and 512")
        rows = []
        for query, table, length in zip(q, block_table.long(), cache_seqlens.tolist(), strict=True):
            keys = k_cache[table].flatten(0, 1)[:length]
            rows.append(formula(query, keys, keys[..., :head_dim_v], softmax_scale, False, (-1, -1)))
        return torch.stack(rows), torch.empty(0)

    made = ModuleType("flash_mla")
    vars(made).update(get_mla_metadata=get_mla_metadata, flash_mla_with_kvcache=flash_mla_with_kvcache)
    return made


def _module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


def adapters(*names: str, flash_mla: int = 2026) -> SimpleNamespace:
    """Modules of the plugin over the formulas, apart from those that other tests import."""
    made = {
        "flash_attn": _module(
            "flash_attn", flash_attn_varlen_func=attention_formulas.flash_attn_varlen_func,
            flash_attn_with_kvcache=attention_formulas.flash_attn_with_kvcache,
        ),
        "transformer_engine": _module("transformer_engine"),
        "transformer_engine.pytorch": _module(
            "transformer_engine.pytorch", DotProductAttention=attention_formulas.DotProductAttention,
            GroupedLinear=GroupedLinear, moe_permute=moe_permute, moe_unpermute=moe_unpermute,
        ),
        "fla": _module("fla"),
        "fla.modules": _module("fla.modules"),
        "fla.modules.causal_conv1d": _module(
            "fla.modules.causal_conv1d", causal_conv1d=causal_conv1d
        ),
        "fla.ops": _module("fla.ops"),
        "fla.ops.gated_delta_rule": _module(
            "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule=fused_recurrent_gated_delta_rule,
        ),
        "causal_conv1d": _module("causal_conv1d", causal_conv1d_update=causal_conv1d_update),
        "flash_mla": flash_mla_of(flash_mla),
        "torch.nn.attention.varlen": _module(
            "torch.nn.attention.varlen", varlen_attn=attention_formulas.varlen_attn
        ),
    }  # fmt: skip
    package = importlib.import_module("grpo_cuda")
    fresh = _with_parts(names)
    kept = {name: vars(package).pop(name) for name in fresh if name in vars(package)}
    with patch.dict(sys.modules, made):
        for name in fresh:
            sys.modules.pop(f"grpo_cuda.{name}", None)
        loaded = SimpleNamespace(**{name: importlib.import_module(f"grpo_cuda.{name}") for name in names})
    for name in fresh:
        vars(package).pop(name, None)
    vars(package).update(kept)
    return loaded


def _with_parts(names: Sequence[str]) -> set[str]:
    """And the modules of the plugin that they take vendors' functions from."""
    return {*names, "flash", "engine", "varlen", "fla"}
