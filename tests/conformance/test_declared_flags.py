"""What an offer declares besides its numbers is asked, and a flag that is not kept is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_conformance.case import Case, Outcome, Target, check_of
from grpo_conformance.levels import ops
from grpo_conformance.ops import flags
from grpo_conformance.ops.capture import Graphs, graphs_of
from grpo_conformance.target import open_target
from grpo_core.catalogue import Offer
from grpo_core.impl import Impl
from grpo_core.ops.contract import CONTRACTS
from grpo_core.ops.reference import attention, fused, linear_attention

HERE = __name__


@pytest.fixture(scope="module")
def cpu() -> Target:
    return open_target("cpu")


def offering(target: Target, op: str, name: str, **declared: Any) -> Target:
    """The target with one offer, a function of this module, for an op; other ops stay."""
    impl = Impl(op=op, name="odd", device="cpu", load=f"{HERE}:{name}", **declared)
    return replace(target, offers={**target.offers, op: (Offer(plugin="acme", impl=impl),)})


def flag_cases(target: Target, op: str, flag: str) -> list[Case]:
    return [c for c in ops.cases(target, quick=False) if c.args["op"] == op and c.id.endswith(f"/{flag}")]


def asked(target: Target, op: str, flag: str) -> Outcome:
    (case, *_) = flag_cases(target, op, flag)
    outcome: Outcome = check_of(case)(target, **case.args)
    return outcome


def blocked_linear(x: Tensor, weight: Tensor, bias: Tensor, *, main_grad_NK: None) -> Tensor:
    """Sums in an order that depends on how many rows there are."""
    pieces = 3 if len(x) > 16 else 1
    parts = zip(x.chunk(pieces, 1), weight.chunk(pieces, 1), strict=True)
    return sum((a @ b.t() for a, b in parts), torch.zeros(len(x), len(weight), dtype=x.dtype)) + bias


def norm_of_the_end(x: Tensor, w: Tensor, **rest: Any) -> Any:
    """The last row of a call goes through other instructions."""
    y = fused.rms_norm(x, w, **rest)
    first = y[0] if isinstance(y, tuple) else y
    first[-1] = torch.nextafter(first[-1], torch.full_like(first[-1], torch.inf))
    return y


def longest_in_blocks(q: Tensor, k: Tensor, v: Tensor, *, max_seqlen: int, **rest: Any) -> Tensor:
    """A scale that is rounded otherwise where a long sequence is in the batch."""
    scale = rest.pop("scale")
    nudged = scale * (1 + 2**-20) if max_seqlen > 100 else scale
    return attention.varlen(q, k, v, max_seqlen=max_seqlen, scale=nudged, **rest)


def chunk_from_the_start(*five: Tensor, initial_state_SKDE: Tensor, **rest: Any) -> Any:
    """Rounds the state that a call starts from, which shows where a sequence is cut."""
    rounded = initial_state_SKDE.bfloat16().float()
    return linear_attention.delta_chunk(*five, initial_state_SKDE=rounded, **rest)


def steady_norm(x: Tensor, w: Tensor, **rest: Any) -> Any:
    return fused.rms_norm(x, w, **rest)


WRONG = {
    "sums in another order in large batches": ("linear.dense", "blocked_linear", "all together"),
    "the end of a batch": ("norm.rms", "norm_of_the_end", "alone"),
    "a long neighbour": ("attention.varlen", "longest_in_blocks", "sequence"),
    "cut into calls": ("gated_delta.chunk", "chunk_from_the_start", "cut after"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_batch_invariant_is_told(cpu: Target, mistake: str) -> None:
    op, name, told = WRONG[mistake]
    outcome = asked(offering(cpu, op, name, batch_invariant=True), op, "batch-invariant")
    assert outcome.status == "fail" and told in outcome.message
    assert outcome.worst["facts"]


def test_a_true_batch_invariant_passes(cpu: Target) -> None:
    assert asked(offering(cpu, "norm.rms", "steady_norm", batch_invariant=True), "norm.rms",
                 "batch-invariant").status == "pass"  # fmt: skip


def test_only_what_is_declared_is_asked(cpu: Target) -> None:
    plain = offering(cpu, "norm.rms", "steady_norm")
    assert not flag_cases(plain, "norm.rms", "batch-invariant") and not flag_cases(plain, "norm.rms", "graph")
    declared = {
        (one.id, op) for op, row in cpu.offers.items() for one in row
        if one.impl.batch_invariant and not op.startswith(("memory.", "comm."))
    }  # fmt: skip
    found = {(c.args["offer_id"], c.args["op"]) for c in ops.cases(cpu, quick=True)
             if c.id.endswith("/batch-invariant")}  # fmt: skip
    assert found == declared and len(found) > 20


def test_every_op_has_a_way_to_be_asked() -> None:
    """Ops over caches have their own."""
    assert {op for op in CONTRACTS if not op.startswith(("memory.", "comm.", "engine.", "optim."))} == {
        *flags.KINDS, *flags.CACHE_OF, *flags.CACHES,
    }  # fmt: skip


def test_all_that_the_cpu_declares_is_true(cpu: Target) -> None:
    wrong = []
    for case in ops.cases(cpu, quick=True):
        if case.run.startswith("grpo_conformance.ops.flags"):
            outcome = check_of(case)(cpu, **case.args)
            wrong += [] if outcome.status == "pass" else [f"{case.id}: {outcome.message}"]
    assert not wrong, "\n".join(wrong)


class Tape(TorchDispatchMode):
    """A device graph for the host: what was done is done again on the same tensors, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host waits for the device in a capture")
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(_listed(out), _listed(again), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def _listed(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple | list) else (out,)) if isinstance(x, Tensor)]


TAPES = Graphs(make=Tape, capturing=lambda tape: tape)


SEEN: dict[int, Tensor] = {}


def remembers_by_address(gate_up: Tensor) -> Tensor:
    """Keeps what it computed from a tensor, and takes the same address for the same tensor."""
    if gate_up.data_ptr() not in SEEN:
        SEEN[gate_up.data_ptr()] = fused.swiglu(gate_up)
    return SEEN[gate_up.data_ptr()] * 1.0


def asks_the_host(gate_up: Tensor) -> Tensor:
    """Branches on a number that the device has computed."""
    return fused.swiglu(gate_up) if float(gate_up.abs().max()) > 0 else gate_up.chunk(2, -1)[0]


def bakes_in_a_number(gate_up: Tensor) -> Tensor:
    """A factor that numpy reads behind torch's back."""
    return fused.swiglu(gate_up) * (1.0 + abs(float(gate_up.detach().numpy().reshape(-1)[0])))


def replays_well(gate_up: Tensor) -> Tensor:
    return fused.swiglu(gate_up)


def replayed(target: Target, name: str, **declared: Any) -> Outcome:
    wanted = offering(target, "mlp.swiglu", name, graph=True, **declared)
    facts = {"intermediate_size": 64, "dtype": "float32"}
    return flags.replayed(TAPES, wanted, wanted.offers["mlp.swiglu"][0], "float32", facts)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("remembers_by_address", "replay on new inputs"),
        ("asks_the_host", "cannot be captured"),
        ("bakes_in_a_number", "replay on new inputs"),
    ],
)
def test_a_wrong_graph_flag_is_told(cpu: Target, name: str, told: str) -> None:
    for exact in (True, False):
        SEEN.clear()
        outcome = replayed(cpu, name, deterministic=exact)
        assert outcome.status == "fail" and told in outcome.message


def test_a_true_graph_flag_passes(cpu: Target) -> None:
    assert replayed(cpu, "replays_well", deterministic=True).status == "pass"


@pytest.mark.parametrize("op", ["gated_delta.step", "short_conv.step", "rope.apply", "mlp.swiglu"])
def test_states_in_place_are_replayed_too(cpu: Target, op: str) -> None:
    offer = next(one for one in cpu.offers[op] if one.id == "core:reference")
    cases = (case for case in ops.cases(cpu, quick=True) if case.args["op"] == op)
    case = next(case for case in cases if case.args["offer_id"] == offer.id)
    outcome = flags.replayed(TAPES, cpu, offer, "float32", {**case.args["facts"], "dtype": "float32"})
    assert outcome.status == "pass", outcome.message


def test_without_graphs_of_the_device_the_flag_cannot_be_asked(cpu: Target) -> None:
    declared = offering(cpu, "norm.rms", "steady_norm", graph=True)
    (case, *_) = flag_cases(declared, "norm.rms", "graph")
    assert case.fragile
    outcome = check_of(case)(declared, **case.args)
    assert (outcome.status, outcome.message) == ("not_declared", "cpu has no feature 'graphs'")


def test_graphs_are_found_where_torch_has_them() -> None:
    """The module of a device that is compiled in, though none is here."""
    found: Callable[[], Any] | str = graphs_of("cuda")
    assert isinstance(found, Graphs) and found.make is torch.cuda.CUDAGraph
    assert "no module" in str(graphs_of("no_such_type"))
