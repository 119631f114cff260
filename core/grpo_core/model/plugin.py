"""The Protocol of a model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..impl import DeviceInfo
    from .arch import Arch
    from .weights import WeightMap


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSpec:
    """How a family talks, besides what its tokenizer and chat template say themselves."""

    stop_tokens: tuple[str, ...] = ()
    """Special tokens that end an assistant turn, besides the tokenizer's eos: ("<|im_end|>",)."""
    thinking: str | None = None
    """The chat template's variable that turns thinking on and off ("enable_thinking"), or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A family's default for one setting."""

    value: Any
    why: str
    """Shown by `grpo plan --config`: what it prevents, and where that was found."""


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

    def chat(self) -> ChatSpec:
        """Tokens that end a turn and the switch for thinking; the template itself is the tokenizer's."""
        ...

    def recipe(self, arch: Arch, device: DeviceInfo, world: int) -> Mapping[str, Advice]:
        """Dotted config keys with the family's defaults for this model; the user's config wins."""
        ...
