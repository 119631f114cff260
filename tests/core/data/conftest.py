"""The registry as the core's own plugin fills it."""

from __future__ import annotations

import pytest

from grpo_core import builtin
from grpo_core.registry import Registry


@pytest.fixture
def registry() -> Registry:
    """With core's rewards and datasets."""
    made = Registry(owner="core")
    builtin.grpo_register(made)
    return made
