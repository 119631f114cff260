"""The cache of a model: tokens of its attention layers, states of its recurrent ones, within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..model.arch import MLA, Attention, GatedDelta
from ..ops.attention import CacheSpec
from .graphs import PAD_TOKENS
from .options import NativeOptions, cache_size, state_rows
from .states import SlotCounter, StatefulCache, States

if TYPE_CHECKING:
    from .base import RolloutSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """What an engine caches."""

    tokens: CacheSpec
    latent: bool
    """Latents (MLA) instead of keys and values."""
    rows: int
    """Rows of recurrent states, that of a graph's padding among them; 0 for a model without any."""
    padding: int = 0
    """Tokens of the cache for rows that a device graph does not fill."""

    @property
    def room(self) -> int:
        """Tokens for sequences."""
        return self.tokens.max_tokens - self.padding


def plan_cache(setup: RolloutSetup, options: NativeOptions) -> CachePlan:
    """Sizes of the caches. Raises `ConfigError` for layers whose caches differ in shape."""
    arch, itemsize = setup.arch, setup.dtype.itemsize
    shapes = {shape for layer in arch.layers if (shape := _shape(layer.mixer)) is not None}
    if len(shapes) > 1:
        raise ConfigError(
            "the native rollout engine cannot serve this model",
            why=f"its layers have key/value shapes {sorted(shapes)} and one cache holds one shape",
            fix="use another rollout engine",
        )
    latent, kv_heads, k_dim, v_dim = shapes.pop() if shapes else (False, 0, 0, 0)
    rows = state_rows(
        options, arch, max_sequences=setup.max_sequences, max_model_len=setup.max_model_len, itemsize=itemsize
    )
    tokens = cache_size(
        options, arch, max_sequences=setup.max_sequences, max_model_len=setup.max_model_len,
        itemsize=itemsize, rows=rows,
    )  # fmt: skip
    # Device graphs need a slot for rows that are not filled.
    padded = int(setup.capture is not None)
    spec = CacheSpec(
        num_layers=sum(_shape(layer.mixer) is not None for layer in arch.layers),
        num_key_value_heads=kv_heads,
        head_dim=k_dim,
        v_head_dim=v_dim,
        dtype=setup.dtype,
        device=setup.device,
        # A running sequence may be the only child of its prompt's slot.
        max_slots=2 * setup.max_sequences + 1 + padded,
        max_tokens=tokens + PAD_TOKENS * padded,
    )
    return CachePlan(
        tokens=spec, latent=latent, rows=rows + padded if rows else 0, padding=PAD_TOKENS * padded
    )


def make_cache(setup: RolloutSetup, plan: CachePlan) -> Any:
    """The cache itself: a `KVCache`, a `LatentCache`, or one of them with states."""
    spec, backend = plan.tokens, setup.backend
    tokens: Any
    if spec.num_layers == 0:
        tokens = SlotCounter(spec.max_slots)
    elif plan.latent:
        tokens = backend.mla.cache(spec)
    else:
        tokens = backend.attention.cache(spec)
    if not plan.rows:
        return tokens
    states = States(setup.arch, rows=plan.rows, dtype=setup.dtype, device=setup.device)
    return StatefulCache(tokens, states, max_slots=spec.max_slots, device=setup.device)


def _shape(mixer: Attention | MLA | GatedDelta) -> tuple[bool, int, int, int] | None:
    """(latent, kv heads, dim of keys, dim of values) of what a layer caches for a token."""
    if isinstance(mixer, Attention):
        return False, mixer.num_key_value_heads, mixer.head_dim, mixer.head_dim
    if isinstance(mixer, MLA):
        return True, 1, mixer.kv_lora_rank + mixer.qk_rope_head_dim, mixer.kv_lora_rank
    return None
