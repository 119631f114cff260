"""Imports torch, and with it the device, to write down what it offers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from grpo_core.hookspecs import hookimpl
from grpo_core.impl import Impl

from ._offer import rms_norm


@hookimpl
def grpo_fused_ops() -> Iterable[Impl]:
    return (rms_norm(rank=90 if torch.get_num_threads() else 0),)
