"""The inference decoder: packed prefill and one-token steps on the bound ops.

Same numbers as `model.transformer.Decoder`, arranged for speed: everything that does not change between
calls is looked up once and kept in one tuple per layer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import embedding

from ..model.arch import Attention, DenseMLP, GatedDelta, MoE
from ..model.rope import rope_table
from .attend import Attend
from .batch import PrefillAt, StepAt
from .mixed import mixed_layers
from .states import StatefulCache
from .weights import HEAD, following_norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import Arch, Rope
    from ..ops.common import Common
    from .batch import Pass, Turn
    from .weights import DecoderWeights


class BoundLayer(NamedTuple):
    """What one dense layer calls, in the order of use."""

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


class _Decoder:
    """What both decoders hold."""

    def __init__(
        self, arch: Arch, backend: Backend, weights: DecoderWeights, *, max_model_len: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._ropes = rope_settings(arch)
        self._tables = [angles(rope, max_model_len, device) for rope in self._ropes]
        self._embed = weights.plain["embed.weight"]
        self._head = weights.linears[HEAD].__call__
        self._norm = partial(backend.norm.rms, eps=arch.rms_norm_eps, zero_centered=arch.zero_centered_norm)
        self._first_norm = weights.plain["layers.0.attn_norm.weight"]

    def _turns(self, positions: Tensor) -> list[Turn]:
        return [(c.index_select(0, positions), s.index_select(0, positions)) for c, s in self._tables]


class DenseDecoder(_Decoder):
    """A model of plain attention and dense feed-forwards, for fixed weights objects (their values may
    change in place)."""

    def __init__(
        self, arch: Arch, backend: Backend, weights: DecoderWeights, cache: Any, *, max_model_len: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__(arch, backend, weights, max_model_len=max_model_len, device=device)
        plain, linears = weights.plain, weights.linears
        self._swiglu = backend.mlp.swiglu
        self._layers = []
        for index, layer in enumerate(arch.layers):
            own = f"layers.{index}"
            assert isinstance(layer.mixer, Attention)
            attend = Attend(layer.mixer, arch, backend, weights, cache.layers[index], f"{own}.attn")
            self._layers.append(
                BoundLayer(
                    qkv=linears[f"{own}.attn.qkv"].__call__,
                    step=attend.fused_step(backend.attention.step),
                    prefill=attend.prefill,
                    out=linears[f"{own}.attn.out"].__call__,
                    mlp_norm=plain[f"{own}.mlp_norm.weight"],
                    gate_up=linears[f"{own}.mlp.gate_up"].__call__,
                    down=linears[f"{own}.mlp.down"].__call__,
                    next_norm=plain[following_norm(arch, index)],
                    rope=self._ropes.index(layer.mixer.rope),
                )
            )

    def step(
        self, tokens_B: Tensor, positions_B: Tensor, slots_B: Tensor, record_BMk: Tensor | None = None,
        common: Common | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, V] of the token after `tokens_B`, which is written at `positions_B` of `slots_B`."""
        norm, swiglu = self._norm, self._swiglu
        turns = self._turns(positions_B)
        residual = embedding(tokens_B, self._embed)
        x = norm(residual, self._first_norm, residual=None)
        for qkv, attend, _, out, mlp_norm, gate_up, down, next_norm, rope in self._layers:
            cos, sin = turns[rope]
            attended = attend(
                qkv(x), cos_BR=cos, sin_BR=sin, positions=positions_B, slots=slots_B, common=common
            )
            x, residual = norm(out(attended), mlp_norm, residual=residual)
            x, residual = norm(down(swiglu(gate_up(x))), next_norm, residual=residual)
        return self._head(x)

    def prefill(self, batch: Pass, record_TMk: Tensor | None = None) -> Tensor:
        """Write a pass into the cache; logits [len(last), V] of the token after each `batch.last` row."""
        norm, swiglu = self._norm, self._swiglu
        turns = self._turns(batch.positions_T)
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


class MixedDecoder(_Decoder):
    """A model of any mixers and feed-forwards; the same two calls, which also note the experts used.

    record_TMk is int16 [T, M, k], M layers with experts in order; rows of a prefill that nobody needs are
    not computed to the end without it.
    """

    def __init__(
        self, arch: Arch, backend: Backend, weights: DecoderWeights, cache: Any, *, max_model_len: int,
        device: torch.device, router_dtype: torch.dtype, consistent: bool,
    ) -> None:  # fmt: skip
        super().__init__(arch, backend, weights, max_model_len=max_model_len, device=device)
        self._row_of = cache.row_of if isinstance(cache, StatefulCache) else None
        self._layers = mixed_layers(
            arch, backend, weights, cache, ropes=self._ropes, router_dtype=router_dtype, consistent=consistent
        )
        self._routed_last = isinstance(arch.layers[-1].ffn, MoE)

    def step(
        self, tokens_B: Tensor, positions_B: Tensor, slots_B: Tensor, record_BMk: Tensor | None = None,
        common: Common | None = None,
    ) -> Tensor:  # fmt: skip
        """See `DenseDecoder.step`."""
        norm = self._norm
        rows_B = self._rows(slots_B)
        at = StepAt(self._turns(positions_B), positions_B, positions_B + 1, slots_B, rows_B, common)
        residual = embedding(tokens_B, self._embed)
        x = norm(residual, self._first_norm, residual=None)
        for step, _, out, mlp_norm, feed_forward, next_norm in self._layers:
            x, residual = norm(out(step(x, at)), mlp_norm, residual=residual)
            x, residual = norm(feed_forward(x, record_BMk), next_norm, residual=residual)
        return self._head(x)

    def prefill(self, batch: Pass, record_TMk: Tensor | None = None) -> Tensor:
        """See `DenseDecoder.prefill`."""
        norm = self._norm
        at = PrefillAt(self._turns(batch.positions_T), batch, self._rows(batch.slots))
        residual = embedding(batch.tokens_T, self._embed)
        x = norm(residual, self._first_norm, residual=None)
        final = len(self._layers) - 1
        whole = record_TMk is not None and self._routed_last
        for index, (_, prefill, out, mlp_norm, feed_forward, next_norm) in enumerate(self._layers):
            mixed = prefill(x, at)
            if index == final and not whole:
                mixed, residual = mixed[batch.last], residual[batch.last]
            x, residual = norm(out(mixed), mlp_norm, residual=residual)
            x, residual = norm(feed_forward(x, record_TMk), next_norm, residual=residual)
        return self._head(x[batch.last] if whole else x)

    def _rows(self, slots: Tensor) -> Tensor:
        return slots if self._row_of is None else self._row_of.index_select(0, slots)


InferenceDecoder = DenseDecoder | MixedDecoder


def make_decoder(
    arch: Arch, backend: Backend, weights: DecoderWeights, cache: Any, *, max_model_len: int,
    device: torch.device, router_dtype: torch.dtype, consistent: bool = False,
) -> InferenceDecoder:  # fmt: skip
    """The decoder of a model over a cache made for it."""
    dense = all(
        isinstance(layer.mixer, Attention) and not layer.mixer.output_gate and isinstance(layer.ffn, DenseMLP)
        for layer in arch.layers
    )
    if dense:
        return DenseDecoder(arch, backend, weights, cache, max_model_len=max_model_len, device=device)
    return MixedDecoder(
        arch, backend, weights, cache, max_model_len=max_model_len, device=device,
        router_dtype=router_dtype, consistent=consistent,
    )  # fmt: skip


def rope_settings(arch: Arch) -> list[Rope]:
    """The distinct rotary settings of a model's layers; most models have one."""
    found: list[Rope] = []
    for layer in arch.layers:
        if not isinstance(layer.mixer, GatedDelta) and layer.mixer.rope not in found:
            found.append(layer.mixer.rope)
    return found


def angles(rope: Rope, max_model_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, float32 [max_model_len, rotary_dim / 2].

    Raises `ConfigError` where a scaling depends on a sequence's length within max_model_len.
    """
    return rope_table(rope, torch.arange(max_model_len, device=device), max_length=max_model_len)
