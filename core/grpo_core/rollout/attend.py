"""Grouped-query attention for inference, with or without an output gate."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import Arch, Attention
    from ..model.arithmetic import Arithmetic
    from ..ops.attention import LayerCache
    from ..ops.common import Common
    from .batch import Pass, PrefillAt, StepAt
    from .weights import DecoderWeights


class Attend:
    """One layer's attention: fused qkv in, heads side by side out."""

    def __init__(
        self, spec: Attention, arch: Arch, backend: Backend, weights: DecoderWeights, cache: LayerCache,
        prefix: str,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.cache = cache
        self.eps = arch.rms_norm_eps
        self.zero_centered = arch.zero_centered_norm
        self.q_norm = weights.plain.get(f"{prefix}.q_norm.weight")
        self.k_norm = weights.plain.get(f"{prefix}.k_norm.weight")
        self.ops = backend.attention
        self.rope = backend.rope.apply
        self.norm = partial(
            backend.norm.rms, eps=self.eps, residual=None, zero_centered=arch.zero_centered_norm
        )
        self.scale = spec.head_dim**-0.5

    def fused_step(self, op: Any) -> Callable[..., Tensor]:
        """The step as one bound op where the backend has it, else as its three parts."""
        if op is None or (self.zero_centered and self.q_norm is not None):
            return self.step
        spec = self.spec
        return partial(
            op, cache=self.cache, num_heads=spec.num_attention_heads, scale=self.scale, window=spec.window,
            interleaved=spec.rope.interleaved, q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps,
        )  # fmt: skip

    def _split(
        self, qkv_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, common: Common | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.spec.num_attention_heads, self.spec.num_key_value_heads
        qkv_THD = qkv_TW.view(-1, heads + 2 * kv_heads, self.spec.head_dim)
        q_THD, k_TKD, v_TKD = torch.split(qkv_THD, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.norm(q_THD, self.q_norm), self.norm(k_TKD, self.k_norm)
        q_THD, k_TKD = self.rope(
            q_THD, k_TKD, cos_TR, sin_TR, interleaved=self.spec.rope.interleaved, common=common
        )
        return q_THD, k_TKD, v_TKD

    def step(
        self, qkv_BW: Tensor, *, cos_BR: Tensor, sin_BR: Tensor, positions: Tensor, slots: Tensor,
        common: Common | None,
    ) -> Tensor:  # fmt: skip
        q_BHD, k_BKD, v_BKD = self._split(qkv_BW, cos_BR, sin_BR, common)
        self.cache.write(k_BKD, v_BKD, slots_T=slots, positions_T=positions)
        o_BHD: Tensor = self.ops.decode(
            q_BHD, self.cache, seqlens_k=positions + 1, slots=slots, scale=self.scale,
            window=self.spec.window, common=common,
        )  # fmt: skip
        return o_BHD.flatten(1)

    def prefill(self, qkv_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, batch: Pass) -> Tensor:
        q_THD, k_TKD, v_TKD = self._split(qkv_TW, cos_TR, sin_TR, batch.common)
        self.cache.write(k_TKD, v_TKD, slots_T=batch.slots_T, positions_T=batch.positions_T)
        o_THD: Tensor
        if batch.fresh:
            o_THD = self.ops.varlen(
                q_THD, k_TKD, v_TKD, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen,
                scale=self.scale, causal=True, window=self.spec.window, common=batch.common,
            )  # fmt: skip
        else:
            o_THD = self.ops.prefill(
                q_THD, self.cache, cu_seqlens_q=batch.cu_seqlens, seqlens_k=batch.seqlens_k,
                slots=batch.slots, scale=self.scale, window=self.spec.window, common=batch.common,
            )  # fmt: skip
        return o_THD.flatten(1)


class AttendMixer:
    """`Attend` from the layer's input on, for layers of mixed kinds."""

    def __init__(
        self, spec: Attention, arch: Arch, backend: Backend, weights: DecoderWeights, cache: LayerCache,
        prefix: str, rope: int, arithmetic: Arithmetic,
    ) -> None:  # fmt: skip
        attend = Attend(spec, arch, backend, weights, cache, prefix)
        self.qkv = weights.linears[f"{prefix}.qkv"].__call__
        self.rope = rope
        self.fused = attend.fused_step(backend.attention.step)
        self.unfused = attend.prefill
        self.gated = spec.output_gate
        self.sigmoid = arithmetic.sigmoid
        self.width = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim

    def step(self, x_BC: Tensor, at: StepAt) -> Tensor:
        """Attended values of one token of each sequence, [B, H * D]."""
        cos, sin = at.turns[self.rope]
        qkv_BW, gate = self._project(x_BC)
        o_BW = self.fused(
            qkv_BW, cos_BR=cos, sin_BR=sin, positions=at.positions, slots=at.slots, common=at.common
        )
        return o_BW if gate is None else o_BW * self.sigmoid(gate)

    def prefill(self, x_TC: Tensor, at: PrefillAt) -> Tensor:
        """Attended values of a pass, [T, H * D]."""
        qkv_TW, gate = self._project(x_TC)
        o_TW = self.unfused(qkv_TW, *at.turns[self.rope], at.batch)
        return o_TW if gate is None else o_TW * self.sigmoid(gate)

    def _project(self, x_TC: Tensor) -> tuple[Tensor, Tensor | None]:
        qkv_TW = self.qkv(x_TC)
        if not self.gated:
            return qkv_TW, None
        return qkv_TW[:, : self.width].contiguous(), qkv_TW[:, self.width :]
