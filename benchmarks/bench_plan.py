"""What planning and binding cost: resolving 40 ops x 10 plugins, a bound call, `grpo --help`. Prints JSON.

    python benchmarks/bench_plan.py

Targets: resolve below 5 ms, a bound call below 1.5 direct ones, --help below 150 ms.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import timeit
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from grpo_core.backend import reference_backend
from grpo_core.backend_slots import NormOps
from grpo_core.catalogue import Catalogue, Offer, PluginInfo
from grpo_core.impl import DeviceInfo, Impl, Need
from grpo_core.ops.contract import Contract
from grpo_core.registry import Registry
from grpo_core.resolve import resolve

OPS, PLUGINS = 40, 10
CALL = "(1, 2, eps=1e-6, residual=None, zero_centered=False)"


def catalogue() -> Catalogue:
    """Ten plugins that each offer forty ops with a requirement, three limits and a `when`."""
    limits = {"dtype": frozenset({"bfloat16"}), "head_dim": range(8, 257, 8), "window": frozenset({False})}
    offers = {}
    for op in range(OPS):
        listed = [
            Impl(op=f"bench.op{op}", name="fast", device="*", load="m:f", requires=("pluggy>=1.5",),
                 limits=limits, when=lambda *_: None, backward=True, rank=10 + (plugin + op) % PLUGINS)
            for plugin in range(PLUGINS)
        ]  # fmt: skip
        offers[f"bench.op{op}"] = tuple(Offer(plugin=f"p{i}", impl=impl) for i, impl in enumerate(listed))
    infos = [
        PluginInfo(id=f"p{i}", distribution=f"d{i}", version="1", module="m", hooks=())
        for i in range(PLUGINS)
    ]
    nothing: Any = MappingProxyType({})
    return Catalogue(plugins=tuple(infos), offers=offers, devices=nothing, models=nothing,
                     registry=Registry(), commands=nothing, owners=nothing, failures=())  # fmt: skip


def resolve_ms() -> float:
    """Milliseconds of one resolution, the median of 50."""
    facts = {"dtype": "bfloat16", "head_dim": 64, "window": False}
    needs = [Need(op=f"bench.op{op}", facts=facts, backward=True) for op in range(OPS)]
    contracts = {need.op: Contract(op=need.op, hook="x", protocol="m:P", reference=None) for need in needs}
    offered, device = catalogue(), DeviceInfo(type="cpu")
    times = []
    for _ in range(50):
        start = time.perf_counter()
        plan = resolve(needs, offered, device, contracts=contracts)
        times.append(time.perf_counter() - start)
    assert len(plan.choices) == OPS and all(len(choice.passed) == PLUGINS - 1 for choice in plan.choices)
    return 1e3 * sorted(times)[len(times) // 2]


def call_ns() -> tuple[float, float]:
    """Nanoseconds of a direct and of a bound call of an empty op, the least of 100 rounds."""

    def rms(x: Any, w: Any, *, eps: float, residual: Any, zero_centered: bool) -> Any:
        return x

    backend = replace(reference_backend(), norm=NormOps(rms=rms))
    timers = [
        timeit.Timer(f"rms{CALL}", globals={"rms": rms}),
        timeit.Timer(f"backend.norm.rms{CALL}", globals={"backend": backend}),
    ]
    rounds = [[timer.timeit(10_000) for timer in timers] for _ in range(100)]
    direct, bound = (1e5 * min(column) for column in zip(*rounds, strict=True))
    return direct, bound


def help_ms() -> float:
    """Milliseconds of `grpo --help`, the least of 5."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "grpo_core.cli.main", "--help"], check=True, capture_output=True
        )
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Measure and print."""
    direct, bound = call_ns()
    result = {
        "ops": OPS,
        "plugins": PLUGINS,
        "resolve_ms": round(resolve_ms(), 3),
        "direct_call_ns": round(direct, 1),
        "bound_call_ns": round(bound, 1),
        "bound_over_direct": round(bound / direct, 3),
        "help_ms": round(help_ms(), 1),
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
