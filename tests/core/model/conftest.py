from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backend() -> Any:
    from grpo_core.ops.reference import attention, fused

    return SimpleNamespace(
        attention=SimpleNamespace(varlen=attention.varlen, shared_prefix=attention.shared_prefix),
        norm=SimpleNamespace(rms=fused.rms_norm),
        rope=SimpleNamespace(apply=fused.rope_apply),
        mlp=SimpleNamespace(swiglu=fused.swiglu),
    )
