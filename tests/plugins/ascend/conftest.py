"""The plugin's modules over the vendor's documented formulas in place of torch_npu."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import npu_formulas
import pytest

MODULES = ("adamw", "collectives", "fusion", "graph", "grouped", "infer", "latent", "memory", "mlp", "moe",
           "norm", "plain", "rope", "sample")  # fmt: skip


def vendor_module() -> ModuleType:
    module = ModuleType("torch_npu")
    for name in dir(npu_formulas):
        if name.startswith("npu_"):
            setattr(module, name, getattr(npu_formulas, name))
    return module


@pytest.fixture(scope="session")
def ascend() -> SimpleNamespace:
    """The plugin's modules by name."""
    before = sys.modules.get("torch_npu")
    sys.modules["torch_npu"] = vendor_module()
    loaded = SimpleNamespace(**{name: importlib.import_module(f"grpo_ascend.{name}") for name in MODULES})
    if before is None:
        del sys.modules["torch_npu"]
    else:
        sys.modules["torch_npu"] = before
    return loaded


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of sizes that the vendor's kernels do not take, for checks that are about something else."""
    monkeypatch.setitem(npu_formulas.STRICT, "heads", False)
