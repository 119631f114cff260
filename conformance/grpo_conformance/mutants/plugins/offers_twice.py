"""Two offers of one name."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl

from ._offer import rms_norm


@hookimpl
def grpo_fused_ops() -> Iterable[Impl]:
    return rms_norm(), rms_norm(rank=60)
