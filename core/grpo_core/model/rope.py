"""Rotary tables for every scaling of the dense families, number for number as transformers computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .arch import Rope


def rope_table(rope: Rope, positions_T: Tensor, *, max_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position: float32 [T, rotary_dim / 2], on the device of `positions_T`.

    positions_T is int64; `max_length` is the length of the longest sequence that the table is used for.
    The attention factor of yarn and longrope is multiplied in. Raises `ConfigError` where the numbers of a
    scaling would depend on the length of the sequence (see `length_limit`).
    """
    limit = length_limit(rope)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"a sequence of {max_length} tokens is too long for rope_type {_kind(rope)!r}",
            why=f"beyond {limit} tokens its frequencies change with the length of each sequence, so that "
            "tokens sampled earlier and the trainer would see different numbers",
            fix=f"keep prompt and completion within {limit} tokens, or use a model with another rope scaling",
        )
    inv_freq_R, attention_factor = inverse_frequencies(rope)
    angles_TR = positions_T[:, None].float() * inv_freq_R.to(positions_T.device)
    return angles_TR.cos() * attention_factor, angles_TR.sin() * attention_factor


def length_limit(rope: Rope) -> int | None:
    """Longest sequence whose numbers do not depend on its length, or None for no limit.

    "dynamic" (NTK by length) keeps its base up to max_position_embeddings; "longrope" its short factors up
    to original_max_position_embeddings.
    """
    kind = _kind(rope)
    if kind == "dynamic":
        return rope.max_position_embeddings
    if kind == "longrope":
        return _original_length(rope)
    return None


def inverse_frequencies(rope: Rope) -> tuple[Tensor, float]:
    """float32 inverse frequencies [rotary_dim / 2] on the CPU, and the attention factor.

    Raises `ConfigError` for a rope_type that is not known.
    """
    kind = _kind(rope)
    compute = SCALINGS.get(kind)
    if compute is None:
        raise ConfigError(
            f"rope_type {kind!r} is not supported",
            why=f"known: {', '.join(SCALINGS)}",
            fix="use a model with one of these, or bring a model plugin of your own",
        )
    return compute(rope)


def _kind(rope: Rope) -> str:
    return str(rope.scaling.get("rope_type") or rope.scaling.get("type") or "default")


def _original_length(rope: Rope) -> int:
    return int(rope.scaling.get("original_max_position_embeddings") or rope.max_position_embeddings)


def _setting(rope: Rope, key: str) -> Any:
    value = rope.scaling.get(key)
    if value is None:
        raise ConfigError(
            f"rope_type {_kind(rope)!r} lacks {key!r}",
            why="the rope scaling of config.json is incomplete",
            fix=f"add {key!r} to rope_scaling (transformers 4) or rope_parameters (transformers 5)",
        )
    return value


def _exponents(rope: Rope) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


def _default(rope: Rope) -> tuple[Tensor, float]:
    # Su et al. 2021. "dynamic" equals it within its length limit.
    return 1.0 / (rope.theta ** _exponents(rope)), 1.0


def _linear(rope: Rope) -> tuple[Tensor, float]:
    inv_freq_R, _ = _default(rope)
    return inv_freq_R / float(_setting(rope, "factor")), 1.0


def _llama3(rope: Rope) -> tuple[Tensor, float]:
    # Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between are mixed.
    inv_freq_R, _ = _default(rope)
    factor = _setting(rope, "factor")
    low, high = _setting(rope, "low_freq_factor"), _setting(rope, "high_freq_factor")
    length = _original_length(rope)
    wavelength_R = 2 * math.pi / inv_freq_R
    scaled_R = torch.where(wavelength_R > length / low, inv_freq_R / factor, inv_freq_R)
    smooth_R = (length / wavelength_R - low) / (high - low)
    mixed_R = (1 - smooth_R) * scaled_R / factor + smooth_R * scaled_R
    medium_R = ~(wavelength_R < length / high) & ~(wavelength_R > length / low)
    return torch.where(medium_R, mixed_R, scaled_R), 1.0


def _yarn(rope: Rope) -> tuple[Tensor, float]:
    # Peng et al. 2023, "YaRN", section 3.2; attention factor from their equation 22.
    length = _original_length(rope)
    factor = rope.scaling.get("factor") or rope.max_position_embeddings / length
    dim = rope.rotary_dim

    def correction(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = (
        correction(rope.scaling.get("beta_fast") or 32),
        correction(rope.scaling.get("beta_slow") or 1),
    )
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    keep_R = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequency_R = rope.theta ** _exponents(rope)
    inv_freq_R = 1.0 / (factor * frequency_R) * (1 - keep_R) + 1.0 / frequency_R * keep_R
    return inv_freq_R, _yarn_attention_factor(rope.scaling, factor)


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(top) / mscale(bottom) if top and bottom else mscale(1.0)


def _longrope(rope: Rope) -> tuple[Tensor, float]:
    # Ding et al. 2024, "LongRoPE"; short factors, which hold up to the original length.
    length = _original_length(rope)
    short_R = torch.tensor(_setting(rope, "short_factor"), dtype=torch.float32)
    inv_freq_R = 1.0 / (short_R * rope.theta ** _exponents(rope))
    attention_factor = rope.scaling.get("attention_factor")
    if attention_factor is None:
        factor = rope.scaling.get("factor") or rope.max_position_embeddings / length
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return inv_freq_R, float(attention_factor)


SCALINGS: Mapping[str, Callable[[Rope], tuple[Tensor, float]]] = MappingProxyType(
    {
        "default": _default,
        "linear": _linear,
        "dynamic": _default,
        "llama3": _llama3,
        "yarn": _yarn,
        "longrope": _longrope,
    }
)
"""Known values of `rope_type`."""
