"""The model families, for the `grpo_models` hook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from grpo_core.hookspecs import hookimpl

from .deepseek_v3 import DeepseekV3
from .llama import Llama
from .qwen2_5 import Qwen2
from .qwen3 import Qwen3
from .qwen3_moe import Qwen3Moe
from .qwen3_next import Qwen3Next

if TYPE_CHECKING:
    from grpo_core.model.plugin import ModelPlugin


@hookimpl
def grpo_models() -> Iterable[ModelPlugin]:
    """One for each set of architectures that share a forward pass."""
    return (Llama(), Qwen2(), Qwen3(), Qwen3Moe(), DeepseekV3(), Qwen3Next())
