"""The layers of a model of mixed kinds, bound for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..model.arch import MLA, Attention, MoE
from ..model.arithmetic import arithmetic
from .attend import AttendMixer
from .delta import DeltaMixer
from .feedforward import make_feedforward
from .latent import LatentMixer
from .states import StatefulCache
from .weights import following_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import Tensor

    from ..backend import Backend
    from ..model.arch import Arch, Rope
    from ..model.arithmetic import Arithmetic
    from .batch import PrefillAt, StepAt
    from .weights import DecoderWeights


class Mixer(Protocol):
    """What a layer does before its output projection."""

    def step(self, x_BC: Tensor, at: StepAt) -> Tensor: ...

    def prefill(self, x_TC: Tensor, at: PrefillAt) -> Tensor: ...


class MixedLayer(NamedTuple):
    """What one layer of any kind calls, in the order of use."""

    step: Callable[[Tensor, StepAt], Tensor]
    prefill: Callable[[Tensor, PrefillAt], Tensor]
    out: Callable[[Tensor], Tensor]
    mlp_norm: Tensor
    feed_forward: Callable[[Tensor, Tensor | None], Tensor]
    next_norm: Tensor
    """Of the layer after this one, or the final norm: the residual sum is fused into it."""


def mixed_layers(
    arch: Arch, backend: Backend, weights: DecoderWeights, cache: Any, *, ropes: Sequence[Rope],
    router_dtype: torch.dtype, consistent: bool,
) -> list[MixedLayer]:  # fmt: skip
    """All layers; those that cache tokens take the cache's layers in order."""
    cached = iter(cache.layers)
    plain = arithmetic(backend, consistent=consistent)
    mixtures = iter(range(len(arch.layers)))
    layers = []
    for index, layer in enumerate(arch.layers):
        own = f"layers.{index}"
        prefix, mixer = _mixer(arch, index, backend, weights, cache, cached, ropes, plain)
        layers.append(
            MixedLayer(
                step=mixer.step,
                prefill=mixer.prefill,
                out=weights.linears[f"{prefix}.out"].__call__,
                mlp_norm=weights.plain[f"{own}.mlp_norm.weight"],
                feed_forward=make_feedforward(
                    layer.ffn, backend, weights, f"{own}.mlp",
                    place=next(mixtures) if isinstance(layer.ffn, MoE) else -1, router_dtype=router_dtype,
                    arithmetic=plain,
                ),
                next_norm=weights.plain[following_norm(arch, index)],
            )
        )  # fmt: skip
    return layers


def _mixer(
    arch: Arch, index: int, backend: Backend, weights: DecoderWeights, cache: Any, cached: Iterator[Any],
    ropes: Sequence[Rope], plain: Arithmetic,
) -> tuple[str, Mixer]:  # fmt: skip
    """The names' prefix and the mixer of one layer."""
    spec = arch.layers[index].mixer
    prefix = f"layers.{index}.attn"
    if isinstance(spec, Attention):
        rope = ropes.index(spec.rope)
        return prefix, AttendMixer(spec, arch, backend, weights, next(cached), prefix, rope, plain)
    if isinstance(spec, MLA):
        return prefix, LatentMixer(spec, backend, weights, next(cached), prefix, ropes.index(spec.rope))
    prefix = f"layers.{index}.linear_attn"
    assert isinstance(cache, StatefulCache)
    return prefix, DeltaMixer(spec, arch, backend, weights, cache.states.layers[index], prefix, plain)
