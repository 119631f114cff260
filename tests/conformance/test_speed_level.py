"""The level of speed: formulas that hold, a clock that waits, and no verdict on slowness."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grpo_conformance.case import Case, Outcome, Target, check_of
from grpo_conformance.levels import speed
from grpo_conformance.ops.table import FAMILIES
from grpo_conformance.speed.clock import Best, Patience, seconds_of
from grpo_conformance.speed.measure import facts_of, figures, is_large, parts_of, sizes_of
from grpo_conformance.speed.table import LOADS
from grpo_conformance.speed.work import seen
from grpo_conformance.target import open_target
from grpo_core.catalogue import Offer
from grpo_core.impl import Impl
from grpo_core.ops.reference import fused

HERE = __name__
EXTRA = {
    # What is not among the inputs that are drawn: rows in a cache, states and tensors written in place.
    "attention.prefill": lambda z: 2 * 4 * z["sequences"] * z["context"] * 4 * 128,
    "attention.decode": lambda z: 2 * 4 * z["sequences"] * z["context"] * 4 * 128,
    "attention.step": lambda z: 2 * 4 * z["sequences"] * (z["context"] + 1) * 4 * 128,
    "attention.cache": lambda z: 2 * 4 * z["tokens"] * 4 * 128,
    "mla.cache": lambda z: 4 * z["tokens"] * (512 + 64),
    "mla.prefill": lambda z: 4 * z["sequences"] * z["context"] * (512 + 64),
    "mla.decode": lambda z: 4 * z["sequences"] * z["context"] * (512 + 64),
    "gated_delta.step": lambda z: 4 * z["sequences"] * 8 * 128 * 128,
    "short_conv.step": lambda z: 4 * z["sequences"] * 2048 * 3,
    "optim.adamw": lambda z: 12 * z["parameters"],
}
NOT_MOVED = {
    # Drawn, but of no size that counts, or not of the op that is timed.
    "moe.combine": ("ids",),
}
ALIKE = ("attention.step", "moe.layer")
"""Without a reference."""


@pytest.fixture(scope="module")
def cpu() -> Target:
    return open_target("cpu")


def by_hand(target: Target, op: str) -> tuple[float, float]:
    """(bytes by the formula, bytes of the tensors that go in and out), in float32 with the reference."""
    sizes = sizes_of(op, quick=True, large=False)
    work = LOADS[op].make(sizes, torch.float32)
    tensors = work.tensors(1)
    offer = next(one for one in target.offers[op] if one.id == "core:reference")
    with torch.no_grad():
        returned = work.prepare(parts_of(target, offer, facts_of(op, sizes, "float32")), tensors)()
    outputs = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
    moved = sum(x.nbytes for x in outputs)
    moved += sum(x.nbytes for name, x in tensors.items() if name not in NOT_MOVED.get(op, ()))
    return work.bytes, moved + EXTRA.get(op, lambda z: 0)(sizes)


@pytest.mark.parametrize("op", [op for op in LOADS if op not in ALIKE])
def test_bytes_are_those_of_the_tensors(cpu: Target, op: str) -> None:
    formula, counted = by_hand(cpu, op)
    assert formula == counted


@pytest.mark.parametrize("op", ["linear.dense", "linear.packed", "loss.logprob", "moe.experts"])
def test_flops_are_those_that_torch_counts(cpu: Target, op: str) -> None:
    """Beside the products, which torch counts alone, there is little."""
    sizes = sizes_of(op, quick=True, large=False)
    work = LOADS[op].make(sizes, torch.float32)
    offer = next(one for one in cpu.offers[op] if one.id == "core:reference")
    call = work.prepare(parts_of(cpu, offer, facts_of(op, sizes, "float32")), work.tensors(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() <= work.flops <= 1.02 * counter.get_total_flops()


def test_flops_of_attention_are_those_that_torch_counts(cpu: Target) -> None:
    """Decode, where the reference computes no pair that is not seen."""
    sizes = sizes_of("attention.decode", quick=True, large=False)
    work = LOADS["attention.decode"].make(sizes, torch.float32)
    offer = next(one for one in cpu.offers["attention.decode"] if one.id == "core:reference")
    facts = facts_of("attention.decode", sizes, "float32")
    call = work.prepare(parts_of(cpu, offer, facts), work.tensors(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == work.flops


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_pairs_are_counted_one_by_one(window: int | None) -> None:
    for before, new in ((0, 1), (0, 9), (7, 1), (5, 4)):
        found = [
            1 for q in range(before, before + new) for k in range(q + 1) if window is None or q - k < window
        ]
        assert seen(before, new, window) == sum(found)


def test_every_op_on_tensors_is_timed() -> None:
    assert set(LOADS) == set(FAMILIES)
    for op, load in LOADS.items():
        assert set(FAMILIES[op].axes) <= set(load.sizes), op
        assert set(load.quick) <= set(load.sizes) and set(load.large) <= set(load.sizes), op


@dataclass
class Lazy:
    """A device whose work is done when somebody waits for it."""

    type: str = "cpu"
    queued: list[float] = field(default_factory=list)

    def synchronize(self) -> None:
        time.sleep(sum(self.queued))
        self.queued.clear()


def test_the_clock_waits_for_the_device() -> None:
    device: Any = Lazy()
    found = seconds_of(lambda: device.queued.append(2e-3), device, Patience(samples=3, seconds=1.0))
    assert 2e-3 <= found < 2e-2


def test_the_first_call_is_not_counted() -> None:
    calls: list[int] = []

    def call() -> None:
        time.sleep(0.2 if not calls else 1e-3)
        calls.append(1)

    device: Any = Lazy()
    assert seconds_of(call, device, Patience(samples=5, seconds=0.1)) < 0.05


def test_figures_are_rates_and_shares() -> None:
    found = figures(8e6, 4e6, 2e-3, Best(copy=8e9, matmul=1e10))
    assert found["bytes_per_second"] == 4e9 and found["flops_per_second"] == 2e9
    assert found["share_of_copy"] == 0.5 and found["share_of_matmul"] == 0.2
    assert found["share_of_bound"] == 0.5


def offering(target: Target, name: str, **declared: Any) -> Target:
    impl = Impl(op="mlp.swiglu", name="odd", device="cpu", load=f"{HERE}:{name}", **declared)
    return replace(target, offers={"mlp.swiglu": (Offer(plugin="acme", impl=impl),)})


def asked(target: Target) -> tuple[Case, Outcome]:
    (case,) = speed.cases(target, quick=True)
    check: Callable[..., Outcome] = check_of(case)
    return case, check(target, **case.args)


def snail(gate_up: torch.Tensor) -> torch.Tensor:
    time.sleep(0.1)
    return fused.swiglu(gate_up)


def test_slow_is_no_failure(cpu: Target) -> None:
    _, outcome = asked(offering(cpu, "snail"))
    assert outcome.status == "pass" and outcome.figures["seconds"] >= 0.1
    assert outcome.figures["share_of_bound"] < 0.1


def test_an_offer_is_timed_at_sizes_that_it_takes(cpu: Target) -> None:
    case, outcome = asked(offering(cpu, "snail", limits={"intermediate_size": frozenset({256})}))
    assert case.args["sizes"]["intermediate_size"] == 256 and outcome.worst["intermediate_size"] == 256
    case, outcome = asked(offering(cpu, "snail", when=lambda info, need: "closed on Sundays"))
    assert outcome.status == "not_declared" and outcome.message == "closed on Sundays"


def test_every_offer_has_one_case_in_the_dtype_of_a_run(cpu: Target) -> None:
    cases = list(speed.cases(cpu, quick=True))
    offered = {(op, one.id) for op, row in cpu.offers.items() if op in LOADS for one in row}
    assert {(c.args["op"], c.args["offer_id"]) for c in cases if "op" in c.args} <= offered
    assert len(cases) == len(offered) and len({case.id for case in cases}) == len(cases)
    first = "bfloat16" if "fast_bf16" in cpu.probe.info.features else "float32"
    dtypes = {case.args["op"]: case.args["dtype"] for case in cases if "op" in case.args}
    assert dtypes["mlp.swiglu"] == first and dtypes["optim.adamw"] == "float32"
    assert not is_large(cpu)


@pytest.mark.parametrize("op", ["norm.rms", "attention.decode", "moe.combine"])
def test_the_references_are_timed(cpu: Target, op: str) -> None:
    found = {c.args["offer_id"]: c for c in speed.cases(cpu, quick=True) if c.args.get("op") == op}
    case = found["core:reference"]
    outcome: Outcome = check_of(case)(cpu, **case.args)
    assert outcome.status == "pass"
    assert outcome.figures["copy_bytes_per_second"] > 1e8 and outcome.figures["matmul_flops_per_second"] > 1e8
    assert outcome.figures["bytes_per_second"] == pytest.approx(
        outcome.figures["bytes"] / outcome.figures["seconds"]
    )
