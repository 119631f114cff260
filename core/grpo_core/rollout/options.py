"""Options of the native rollout engine (`rollout.options`) and the sizes that follow from them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from ..model.arch import MLA, Arch, Attention
from .states import state_bytes

PAGE_SLACK = 512
"""Tokens added to a cache for the rounding of a prompt's and a completion's pages."""


class NativeOptions(BaseModel):
    """Options of `rollout.engine: native`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_tokens: int = Field(0, ge=0)
    """Tokens that the key/value cache holds; 0 is room for all at their longest, within `cache_gib`."""
    cache_gib: float = Field(2.0, gt=0)
    """Upper bound of an automatic cache in GiB, recurrent states included."""
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
    """Bytes that the caches of all layers hold for one token."""
    total = 0
    for layer in arch.layers:
        mixer = layer.mixer
        if isinstance(mixer, Attention):
            total += 2 * mixer.num_key_value_heads * mixer.head_dim * itemsize
        elif isinstance(mixer, MLA):
            total += (mixer.kv_lora_rank + mixer.qk_rope_head_dim) * itemsize
    return total


def state_rows(
    options: NativeOptions, arch: Arch, *, max_sequences: int, max_model_len: int, itemsize: int
) -> int:
    """Sequences whose recurrent states are held at once; 0 for a model without such layers.

    Room for `max_sequences` and their prompts, within `cache_gib` together with the tokens of as many; at
    least a prompt and one sample of it.
    """
    state = state_bytes(arch, itemsize)
    if state == 0:
        return 0
    budget = int(options.cache_gib * 2**30)
    token = token_bytes(arch, itemsize)
    if options.cache_tokens:
        affordable = (budget - options.cache_tokens * token) // state
    else:
        # A group's prompt holds a row too; half as many prompts as samples is the most.
        affordable = 3 * budget // (2 * max_model_len * token + 3 * state)
    wanted = max_sequences + (max_sequences + 1) // 2 + 1
    return max(min(wanted, affordable), 2)


def cache_size(
    options: NativeOptions, arch: Arch, *, max_sequences: int, max_model_len: int, itemsize: int, rows: int
) -> int:
    """Tokens of the cache beside `rows` states; at least one sequence at its longest fits."""
    if options.cache_tokens:
        return options.cache_tokens
    longest = max_sequences * max_model_len
    per_token = token_bytes(arch, itemsize)
    if per_token:
        left = int(options.cache_gib * 2**30) - rows * state_bytes(arch, itemsize)
        longest = min(longest, left // per_token)
    return max(longest, max_model_len) + PAGE_SLACK
