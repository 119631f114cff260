"""The one offer of the plugins here, which is sound in itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo_core.impl import Impl

from ..mutant import healthy_offers


def rms_norm(**changed: Any) -> Impl:
    """The simulated device's `norm.rms`."""
    return replace(healthy_offers()["norm.rms"], **changed)
