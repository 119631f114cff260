"""What the simulated device says of itself. No torch, no compiler."""

from __future__ import annotations

from grpo_core.devices.torch_device import TorchDevice

CAPACITY = 4 << 30
"""Bytes of one device's memory."""
COUNT = 2

SIM = TorchDevice(
    name="sim",
    type="sim",
    vendor="grpo-core",
    visible_env="",
    comm="sim-gloo",
    product="simulated accelerator",
    packages=("grpo_conformance.sim.runtime",),
    count=COUNT,
    dtypes=frozenset({"bfloat16", "float16", "float32"}),
    features=frozenset({"simulated", "graphs"}),
    memory_bytes=CAPACITY,
)
