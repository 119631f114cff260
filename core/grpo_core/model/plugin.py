"""The Protocol of a model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .arch import Arch
    from .weights import WeightMap


class ModelPlugin(Protocol):
    """One model family; `grpo_models` answers with instances. Imports no torch until asked for weights."""

    name: str
    architectures: tuple[str, ...]
    """`architectures` of config.json that it claims: ("Qwen2ForCausalLM",)."""

    def arch(self, hf_config: Mapping[str, Any]) -> Arch:
        """Raises `ConfigError` that names a setting of config.json which the family does not support."""
        ...

    def weights(self, arch: Arch) -> WeightMap:
        """A fresh, frozen map for this model."""
        ...

    def stop_tokens(self) -> tuple[str, ...]:
        """Special tokens that end an assistant turn, besides the tokenizer's eos: ("<|im_end|>",)."""
        ...

    def recipe(self, device: str, world: int) -> Mapping[str, Any]:
        """Dotted config keys with the family's defaults; the user's config wins."""
        ...
