"""Options of the native rollout engine (`rollout.options`) and the sizes that follow from them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from ..model.arch import Arch

PAGE_SLACK = 512
"""Tokens added to a cache for the rounding of a prompt's and a completion's pages."""


class NativeOptions(BaseModel):
    """Options of `rollout.engine: native`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_tokens: int = Field(0, ge=0)
    """Tokens that the key/value cache holds; 0 is room for all at their longest, within `cache_gib`."""
    cache_gib: float = Field(2.0, gt=0)
    """Upper bound of an automatic cache, in GiB."""
    prefill_tokens: int = Field(2048, ge=1)
    """Prompt tokens of one forward pass; a longer prompt takes several."""


def parse_options(options: Mapping[str, Any]) -> NativeOptions:
    """Raises `ConfigError` for an unknown option or a value out of range."""
    try:
        return NativeOptions.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        near = difflib.get_close_matches(name, NativeOptions.model_fields, n=1)
        raise ConfigError(
            f"rollout.options.{name} cannot be used",
            why=f"{first['msg']} (options: {', '.join(NativeOptions.model_fields)})",
            fix=f"did you mean {near[0]!r}?" if near else "see the options of the native rollout engine",
        ) from error


def token_bytes(arch: Arch, itemsize: int) -> int:
    """Bytes of one token's keys and values over all layers."""
    return sum(2 * layer.mixer.num_key_value_heads * layer.mixer.head_dim * itemsize for layer in arch.layers)


def cache_size(
    options: NativeOptions, arch: Arch, *, max_sequences: int, max_model_len: int, itemsize: int
) -> int:
    """Tokens of the cache; at least one sequence at its longest fits."""
    if options.cache_tokens:
        return options.cache_tokens
    affordable = int(options.cache_gib * 2**30) // token_bytes(arch, itemsize)
    return max(min(max_sequences * max_model_len, affordable), max_model_len) + PAGE_SLACK
