"""Looks for its device in the network while it is imported."""

from __future__ import annotations

import time
from collections.abc import Iterable

from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl

from ._offer import rms_norm

time.sleep(2.5)


@hookimpl
def grpo_fused_ops() -> Iterable[Impl]:
    return (rms_norm(),)
