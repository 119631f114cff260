from __future__ import annotations

import importlib
import platform
import subprocess
import sys

import pytest

from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.signatures import mismatch
from grpo_cpu import plugin, torch_offers

OFFERS = [impl for _, impl in torch_offers.offers()]


@pytest.mark.parametrize("impl", OFFERS, ids=lambda impl: impl.op)
def test_every_offer_loads_and_has_the_signature_of_its_contract(impl: Impl) -> None:
    contract = CONTRACTS[impl.op]
    module, _, attribute = impl.load.partition(":")
    served = getattr(importlib.import_module(module), attribute)
    protocol_module, _, protocol_name = contract.protocol.partition(":")
    protocol = getattr(importlib.import_module(protocol_module), protocol_name)
    assert mismatch(served, protocol, contract.kind) is None
    assert impl.device == "cpu"
    assert impl.backward == contract.backward


def test_every_offer_goes_through_the_hook_of_its_contract() -> None:
    for hook, impl in torch_offers.offers():
        assert CONTRACTS[impl.op].hook == hook
        assert impl in getattr(plugin, f"grpo_{hook}")()
    names = [(impl.op, impl.name) for _, impl in torch_offers.offers()]
    assert len(set(names)) == len(names)


def test_packed_linears_are_refused_where_torch_has_no_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = next(impl for impl in OFFERS if impl.op == "linear.packed")
    info, need = DeviceInfo(type="cpu"), Need(op="linear.packed")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert impl.when(info, need) is None
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "oneDNN for riscv64" in impl.when(info, need)


def test_the_plugin_imports_no_torch() -> None:
    code = (
        "import sys, grpo_cpu.plugin as p;"
        "[list(getattr(p, n)()) for n in dir(p) if n.startswith('grpo_')];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
