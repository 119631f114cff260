"""The inference decoder: packed prefill and one-token steps on the bound ops.

Same numbers as `model.transformer.Decoder`, arranged for speed: everything that does not change between
calls is looked up once and kept in one tuple per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import embedding

from ..model.rope import rope_table
from .weights import HEAD

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import Arch, Attention, Rope
    from ..ops.attention import KVCache, LayerCache
    from .weights import DecoderWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One packed prefill pass: chunks of prompts, one after the other without padding."""

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    """int64, like the two above: where each token is written."""
    cu_seqlens: Tensor
    """int32 [chunks + 1]"""
    max_seqlen: int
    slots: Tensor
    """int64 [chunks]"""
    seqlens_k: Tensor
    """int64 [chunks]; tokens of the sequence once this chunk is written."""
    fresh: bool
    """Every chunk starts its sequence: nothing is read from the cache."""
    last: Tensor
    """int64; the rows of T that end a prompt, whose logits are wanted."""


class BoundLayer(NamedTuple):
    """What one layer calls, in the order of use."""

    qkv: Callable[[Tensor], Tensor]
    step: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    out: Callable[[Tensor], Tensor]
    mlp_norm: Tensor
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    next_norm: Tensor
    """Of the layer after this one, or the final norm: the residual sum is fused into it."""
    rope: int


class InferenceDecoder:
    """A model's forward pass over a cache, for fixed weights objects (their values may change in place)."""

    def __init__(
        self, arch: Arch, backend: Backend, weights: DecoderWeights, cache: KVCache, *, max_model_len: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        plain, linears = weights.plain, weights.linears
        ropes: list[Rope] = []
        for layer in arch.layers:
            if layer.mixer.rope not in ropes:
                ropes.append(layer.mixer.rope)
        self._tables = [angles(rope, max_model_len, device) for rope in ropes]
        self._embed = plain["embed.weight"]
        self._head = linears[HEAD].__call__
        self._norm = partial(backend.norm.rms, eps=arch.rms_norm_eps, zero_centered=False)
        self._swiglu = backend.mlp.swiglu
        self._first_norm = plain["layers.0.attn_norm.weight"]
        self._layers = []
        for index, layer in enumerate(arch.layers):
            own = f"layers.{index}"
            following = f"layers.{index + 1}.attn_norm" if index + 1 < len(arch.layers) else "norm"
            attend = Attend(
                layer.mixer, backend, cache.layers[index], arch.rms_norm_eps,
                plain.get(f"{own}.attn.q_norm.weight"), plain.get(f"{own}.attn.k_norm.weight"),
            )  # fmt: skip
            self._layers.append(
                BoundLayer(
                    qkv=linears[f"{own}.attn.qkv"].__call__,
                    step=attend.fused_step(backend.attention.step),
                    prefill=attend.prefill,
                    out=linears[f"{own}.attn.out"].__call__,
                    mlp_norm=plain[f"{own}.mlp_norm.weight"],
                    gate_up=linears[f"{own}.mlp.gate_up"].__call__,
                    down=linears[f"{own}.mlp.down"].__call__,
                    next_norm=plain[f"{following}.weight"],
                    rope=ropes.index(layer.mixer.rope),
                )
            )

    def step(self, tokens_B: Tensor, positions_B: Tensor, slots_B: Tensor) -> Tensor:
        """Logits [B, V] of the token after `tokens_B`, which is written at `positions_B` of `slots_B`."""
        norm, swiglu = self._norm, self._swiglu
        turns = [(c.index_select(0, positions_B), s.index_select(0, positions_B)) for c, s in self._tables]
        residual = embedding(tokens_B, self._embed)
        x = norm(residual, self._first_norm, residual=None)
        for qkv, attend, _, out, mlp_norm, gate_up, down, next_norm, rope in self._layers:
            cos, sin = turns[rope]
            attended = attend(qkv(x), cos_BR=cos, sin_BR=sin, positions=positions_B, slots=slots_B)
            x, residual = norm(out(attended), mlp_norm, residual=residual)
            x, residual = norm(down(swiglu(gate_up(x))), next_norm, residual=residual)
        return self._head(x)

    def prefill(self, batch: Pass) -> Tensor:
        """Write a pass into the cache; logits [len(last), V] of the token after each `batch.last` row."""
        norm, swiglu = self._norm, self._swiglu
        at = batch.positions_T
        turns = [(c.index_select(0, at), s.index_select(0, at)) for c, s in self._tables]
        residual = embedding(batch.tokens_T, self._embed)
        x = norm(residual, self._first_norm, residual=None)
        final = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attended = layer.prefill(layer.qkv(x), *turns[layer.rope], batch)
            if index == final:
                # Nobody reads the other rows after the last attention.
                attended, residual = attended[batch.last], residual[batch.last]
            x, residual = norm(layer.out(attended), layer.mlp_norm, residual=residual)
            x, residual = norm(layer.down(swiglu(layer.gate_up(x))), layer.next_norm, residual=residual)
        return self._head(x)


class Attend:
    """One layer's attention for inference: fused qkv in, heads side by side out."""

    def __init__(
        self, spec: Attention, backend: Backend, cache: LayerCache, eps: float, q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.cache = cache
        self.eps = eps
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.ops = backend.attention
        self.rope = backend.rope.apply
        self.norm = partial(backend.norm.rms, eps=eps, residual=None, zero_centered=False)
        self.scale = spec.head_dim**-0.5

    def fused_step(self, op: Any) -> Callable[..., Tensor]:
        """The step as one bound op where the backend has it, else as its three parts."""
        if op is None:
            return self.step
        spec = self.spec
        return partial(
            op, cache=self.cache, num_heads=spec.num_attention_heads, scale=self.scale, window=spec.window,
            interleaved=spec.rope.interleaved, q_norm=self.q_norm, k_norm=self.k_norm, eps=self.eps,
        )  # fmt: skip

    def _split(self, qkv_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.spec.num_attention_heads, self.spec.num_key_value_heads
        qkv_THD = qkv_TW.view(-1, heads + 2 * kv_heads, self.spec.head_dim)
        q_THD, k_TKD, v_TKD = torch.split(qkv_THD, [heads, kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.norm(q_THD, self.q_norm), self.norm(k_TKD, self.k_norm)
        q_THD, k_TKD = self.rope(q_THD, k_TKD, cos_TR, sin_TR, interleaved=self.spec.rope.interleaved)
        return q_THD, k_TKD, v_TKD

    def step(
        self, qkv_BW: Tensor, *, cos_BR: Tensor, sin_BR: Tensor, positions: Tensor, slots: Tensor
    ) -> Tensor:
        q_BHD, k_BKD, v_BKD = self._split(qkv_BW, cos_BR, sin_BR)
        self.cache.write(k_BKD, v_BKD, slots_T=slots, positions_T=positions)
        o_BHD: Tensor = self.ops.decode(
            q_BHD, self.cache, seqlens_k=positions + 1, slots=slots, scale=self.scale, window=self.spec.window
        )
        return o_BHD.flatten(1)

    def prefill(self, qkv_TW: Tensor, cos_TR: Tensor, sin_TR: Tensor, batch: Pass) -> Tensor:
        q_THD, k_TKD, v_TKD = self._split(qkv_TW, cos_TR, sin_TR)
        self.cache.write(k_TKD, v_TKD, slots_T=batch.slots_T, positions_T=batch.positions_T)
        o_THD: Tensor
        if batch.fresh:
            o_THD = self.ops.varlen(
                q_THD, k_TKD, v_TKD, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen,
                scale=self.scale, causal=True, window=self.spec.window,
            )  # fmt: skip
        else:
            o_THD = self.ops.prefill(
                q_THD, self.cache, cu_seqlens_q=batch.cu_seqlens, seqlens_k=batch.seqlens_k,
                slots=batch.slots, scale=self.scale, window=self.spec.window,
            )  # fmt: skip
        return o_THD.flatten(1)


def angles(rope: Rope, max_model_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [max_model_len, rotary_dim / 2].

    Raises `ConfigError` where a scaling depends on a sequence's length within max_model_len.
    """
    return rope_table(rope, torch.arange(max_model_len, device=device), max_length=max_model_len)
