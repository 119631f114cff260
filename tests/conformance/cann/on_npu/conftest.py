"""Tests on the NPU of the simulated CANN, with the real torch-npu. `make ascend-sim` runs them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("torch_npu") is None
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            if missing:
                item.add_marker(pytest.mark.skip(reason="torch-npu is not installed: make ascend-sim"))


@pytest.fixture(scope="session", autouse=True)
def npu() -> None:
    """torch_npu, loaded as the plugin loads it. Without the simulated CANN these tests cannot be run."""
    if "GRPO_CANN_NUMERIC" not in os.environ:
        pytest.fail("run them with: python -m grpo_conformance.cann -- python -m pytest ...")
    from grpo_ascend.device import ASCEND

    ASCEND.open(0)
