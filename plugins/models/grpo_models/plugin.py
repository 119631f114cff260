"""The model families, for the `grpo_models` hook."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from grpo_core.hookspecs import hookimpl

from .llama import Llama
from .qwen2 import Qwen2
from .qwen3 import Qwen3

if TYPE_CHECKING:
    from grpo_core.model.plugin import ModelPlugin


@hookimpl
def grpo_models() -> Iterable[ModelPlugin]:
    """Dense families in Llama's weight layout."""
    return (Llama(), Qwen2(), Qwen3())
