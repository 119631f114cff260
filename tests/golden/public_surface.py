"""Prints the public surface: hooks, contracts, Protocol signatures and the records of the hooks.

python tests/golden/public_surface.py > tests/golden/public_surface.txt
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from grpo_core import hookspecs, registry
from grpo_core.backend import import_pointer
from grpo_core.devices.base import Device, Graph, GraphDevice, Probe
from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.model.plugin import ModelPlugin
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plugins import GROUP
from grpo_core.signatures import protocol_methods

RECORDS = (Impl, Need, DeviceInfo, Probe)
PARTS = (
    "grpo_core.ops.attention:LayerCache", "grpo_core.ops.attention:CacheSpec",
    "grpo_core.model.plugin:ChatSpec", "grpo_core.model.plugin:Advice",
    "grpo_core.ops.collectives:Group", "grpo_core.ops.memory:MemoryStats",
    "grpo_core.rollout.base:RolloutSetup", "grpo_core.train.base:TrainSetup", "grpo_core.types:Sample",
    "grpo_core.types:Sampling", "grpo_core.types:Prompt", "grpo_core.types:Completion",
    "grpo_core.types:Batch", "grpo_core.algo.loss:PolicyLoss", "grpo_core.algo.loss:LossTerms",
    "grpo_core.devices.doctor:Doctor", "grpo_core.devices.doctor:Check", "grpo_core.devices.doctor:Row",
    "grpo_core.devices.doctor:Step",
)  # fmt: skip


def surface() -> str:
    """The whole text."""
    lines = [f"entry points: {GROUP}", ""]
    for name, hook in sorted(vars(hookspecs).items()):
        if name.startswith("grpo_"):
            lines.append(f"hook {name}{_signature(hook)}")
    lines.append("")
    for contract in CONTRACTS.values():
        lines.append(f"op {contract.op}")
        fields = {field.name: getattr(contract, field.name) for field in dataclasses.fields(contract)}
        lines += [
            f"  {name}: {value!r}" for name, value in fields.items() if name not in ("op", "added") and value
        ]
        lines += [f"  added {name}: {value!r}" for name, value in contract.added.items()]
        lines += [f"  {line}" for line in _members(import_pointer(contract.protocol))]
    for served in (*RECORDS, Device, GraphDevice, Graph, ModelPlugin, *map(import_pointer, PARTS)):
        lines += ["", f"{'record' if dataclasses.is_dataclass(served) else 'protocol'} {served.__name__}"]
        lines += [f"  {line}" for line in _members(served)]
    lines += ["", "registry"]
    lines += [f"  {kind}" for kind in registry.KINDS]
    return "\n".join(lines) + "\n"


def _members(served: Any) -> Iterator[str]:
    if dataclasses.is_dataclass(served):
        for field in dataclasses.fields(served):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            yield f"{field.name}: {field.type}{'' if required else ' (has a default)'}"
        return
    # The module is read as text annotations: names that only type checkers import stay names.
    importlib.import_module(served.__module__)
    for name, annotation in sorted(vars(served).get("__annotations__", {}).items()):
        yield f"{name}: {annotation}"
    for name, value in vars(served).items():
        if isinstance(value, property) and value.fget is not None:
            yield f"{name}: {inspect.signature(value.fget).return_annotation}"
    for name, method in protocol_methods(served).items():
        yield f"{name}{_signature(method)}"


def _signature(function: Any) -> str:
    return str(inspect.signature(function)).replace("'", "")


if __name__ == "__main__":
    print(surface(), end="")
