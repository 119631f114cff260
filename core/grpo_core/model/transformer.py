"""The one decoder: built from an `Arch`, computing on bound ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .embedding import lookup
from .rope import length_limit, rope_table

if TYPE_CHECKING:
    from ..backend import Backend
    from .arch import Arch, Attention, DenseMLP, Layer, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the packed tokens of one forward pass are cut into segments."""

    cu_seqlens: Tensor
    """int32 [S + 1]"""
    parents: Tensor | None
    """int32 [S], or None where every segment stands alone."""
    max_seqlen: int


class Linear(nn.Module):
    """x W^T + b with parameters that start uninitialised."""

    def __init__(self, rows: int, columns: int, *, bias: bool, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Weight(nn.Module):
    """A parameter under the name `weight`, uninitialised: a norm's scale or the embedding's table."""

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class AttentionMixer(nn.Module):
    """Grouped-query attention over packed tokens: hidden [T, C] -> [T, C]."""

    def __init__(
        self, spec: Attention, arch: Arch, backend: Backend, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__()
        self.spec, self.backend, self.eps = spec, backend, arch.rms_norm_eps
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.qkv = Linear(
            (heads + 2 * kv_heads) * dim, arch.hidden_size, bias=spec.qkv_bias, device=device, dtype=dtype
        )
        self.out = Linear(arch.hidden_size, heads * dim, bias=spec.out_bias, device=device, dtype=dtype)
        if spec.qk_norm:
            self.q_norm = Weight(dim, device=device, dtype=dtype)
            self.k_norm = Weight(dim, device=device, dtype=dtype)

    def forward(self, x_TC: Tensor, cos_TR: Tensor, sin_TR: Tensor, packing: Packing) -> Tensor:
        spec, ops = self.spec, self.backend
        heads, kv_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        qkv_THD = self.qkv(x_TC).unflatten(-1, (heads + 2 * kv_heads, dim))
        q_THD, k_TKD, v_TKD = qkv_THD.split((heads, kv_heads, kv_heads), dim=1)
        if spec.qk_norm:
            q_THD = ops.norm.rms(q_THD, self.q_norm.weight, eps=self.eps, residual=None, zero_centered=False)
            k_TKD = ops.norm.rms(k_TKD, self.k_norm.weight, eps=self.eps, residual=None, zero_centered=False)
        q_THD, k_TKD = ops.rope.apply(q_THD, k_TKD, cos_TR, sin_TR, interleaved=spec.rope.interleaved)
        if packing.parents is None:
            o_THD = ops.attention.varlen(
                q_THD, k_TKD, v_TKD, cu_seqlens=packing.cu_seqlens, max_seqlen=packing.max_seqlen,
                scale=dim**-0.5, causal=True, window=spec.window,
            )  # fmt: skip
        else:
            o_THD = ops.attention.shared_prefix(
                q_THD, k_TKD, v_TKD, cu_seqlens=packing.cu_seqlens, parents=packing.parents,
                max_seqlen=packing.max_seqlen, scale=dim**-0.5, window=spec.window,
            )  # fmt: skip
        return self.out(o_THD.flatten(1))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """SwiGLU feed-forward: hidden [T, C] -> [T, C]."""

    def __init__(
        self, spec: DenseMLP, arch: Arch, backend: Backend, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__()
        self.backend = backend
        self.gate_up = Linear(
            2 * spec.intermediate_size, arch.hidden_size, bias=spec.bias, device=device, dtype=dtype
        )
        self.down = Linear(
            arch.hidden_size, spec.intermediate_size, bias=spec.bias, device=device, dtype=dtype
        )

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down(self.backend.mlp.swiglu(self.gate_up(x_TC)))  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """Norm, mixer, norm, feed-forward; the residual stream travels beside the last branch's output."""

    def __init__(
        self, layer: Layer, arch: Arch, backend: Backend, *, device: torch.device, dtype: torch.dtype
    ):
        super().__init__()
        self.backend, self.eps = backend, arch.rms_norm_eps
        self.attn_norm = Weight(arch.hidden_size, device=device, dtype=dtype)
        self.attn = AttentionMixer(layer.mixer, arch, backend, device=device, dtype=dtype)
        self.mlp_norm = Weight(arch.hidden_size, device=device, dtype=dtype)
        self.mlp = SwiGLU(layer.ffn, arch, backend, device=device, dtype=dtype)

    def forward(
        self, x_TC: Tensor, residual_TC: Tensor | None, cos_TR: Tensor, sin_TR: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        rms = self.backend.norm.rms
        if residual_TC is None:
            residual_TC = x_TC
            h_TC = rms(x_TC, self.attn_norm.weight, eps=self.eps, residual=None, zero_centered=False)
        else:
            h_TC, residual_TC = rms(
                x_TC, self.attn_norm.weight, eps=self.eps, residual=residual_TC, zero_centered=False
            )
        x_TC = self.attn(h_TC, cos_TR, sin_TR, packing)
        h_TC, residual_TC = rms(
            x_TC, self.mlp_norm.weight, eps=self.eps, residual=residual_TC, zero_centered=False
        )
        return self.mlp(h_TC), residual_TC


class Decoder(nn.Module):
    """A causal language model without its cache: packed tokens in, hidden states out.

    Parameters carry the neutral names of `WeightMap` and start uninitialised: load a checkpoint into them
    or call `init_weights`. `backend` gives every op; the decoder itself only multiplies by weights.
    """

    def __init__(
        self, arch: Arch, backend: Backend, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.arch, self.backend = arch, backend
        self.ropes: list[Rope] = []
        """Distinct rotary settings; most models have one."""
        for layer in arch.layers:
            if layer.mixer.rope not in self.ropes:
                self.ropes.append(layer.mixer.rope)
        self.rope_of_layer = [self.ropes.index(layer.mixer.rope) for layer in arch.layers]
        self.embed = Weight(arch.vocab_size, arch.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(layer, arch, backend, device=device, dtype=dtype) for layer in arch.layers
        )
        self.norm = Weight(arch.hidden_size, device=device, dtype=dtype)
        if not arch.tie_word_embeddings:
            self.lm_head = Weight(arch.vocab_size, arch.hidden_size, device=device, dtype=dtype)

    def head_weight(self) -> Tensor:
        """The output projection [V, C]: its own parameter, or the embedding's where the two are tied."""
        return self.embed.weight if self.arch.tie_word_embeddings else self.lm_head.weight

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, *, cu_seqlens: Tensor, parents: Tensor | None,
        max_seqlen: int, recompute: bool,
    ) -> Tensor:  # fmt: skip
        """Hidden states [T, C] after the final norm, in the parameters' dtype.

        tokens_T and positions_T are int64 [T]; cu_seqlens int32 [S + 1]; parents int32 [S] or None for
        segments that stand alone; max_seqlen the longest segment, its parent not counted. `recompute`
        keeps only each layer's inputs and computes the rest again in the backward pass, bit for bit.
        """
        tables = [self._table(rope, positions_T, max_seqlen) for rope in self.ropes]
        packing = Packing(cu_seqlens=cu_seqlens, parents=parents, max_seqlen=max_seqlen)
        x_TC, residual_TC = lookup(self.embed.weight, tokens_T), None
        for layer, rope in zip(self.layers, self.rope_of_layer, strict=True):
            inputs = (x_TC, residual_TC, *tables[rope], packing)
            if recompute and torch.is_grad_enabled():
                x_TC, residual_TC = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TC, residual_TC = layer(*inputs)
        hidden_TC, _ = self.backend.norm.rms(
            x_TC, self.norm.weight, eps=self.arch.rms_norm_eps, residual=residual_TC, zero_centered=False
        )
        return hidden_TC  # type: ignore[no-any-return]

    def init_weights(self, seed: int) -> None:
        """Fill the parameters as a fresh model: normal matrices, unit norms, zero biases.

        The draw depends on the seed and the arch only, not on device or dtype.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.fill_(1.0)
                elif name.endswith(".bias"):
                    parameter.zero_()
                else:
                    drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.copy_(drawn * self.arch.initializer_range)

    def _table(self, rope: Rope, positions_T: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
        # A segment goes on where its parent ends, so only positions know the true length; reading them
        # costs a synchronisation, paid by the two scalings that have a limit.
        limited = length_limit(rope) is not None and positions_T.numel() > 0
        return rope_table(rope, positions_T, max_length=int(positions_T.max()) + 1 if limited else max_seqlen)
