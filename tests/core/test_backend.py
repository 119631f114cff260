"""Binding: pointers are imported and checked once, before anything runs."""

from __future__ import annotations

import dataclasses
import sys
import timeit
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_helpers import CPU, catalogue_of

from grpo_core.backend import NAMESPACES, adapt, bind, import_pointer, reference_backend
from grpo_core.backend_slots import NormOps
from grpo_core.errors import PluginError
from grpo_core.impl import Impl, Need
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Choice, Plan
from grpo_core.plugins import load
from grpo_core.resolve import resolve


def reference_plan(**changes: Choice) -> Plan:
    """A plan of references; `changes` replace rows, op written with "_" for "."."""
    rows = {
        op: Choice(op=op, chosen="core:reference", load=contract.reference, reason="reference")
        if contract.reference
        else Choice(op=op, chosen=None, load="", reason="optional, nothing serves it")
        for op, contract in CONTRACTS.items()
    }
    rows.update({name.replace("_", ".", 1): row for name, row in changes.items()})
    return Plan(device=CPU, choices=tuple(rows.values()), plugins=(), fallback="none")


def row(op: str, load: str, **fields: Any) -> Choice:
    return Choice(op=op, chosen="acme:fast", load=load, reason="rank 80", **fields)


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package folder "acme_kernels" to write modules into."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    package = tmp_path / "acme_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    yield package  # type: ignore[misc]
    for name in [name for name in sys.modules if name.split(".")[0] == "acme_kernels"]:
        del sys.modules[name]


def test_every_contract_has_a_slot_and_every_slot_a_contract() -> None:
    slots = {
        f"{space}.{field.name}" for space, make in NAMESPACES.items() for field in dataclasses.fields(make)
    }  # type: ignore[arg-type]
    assert slots == set(CONTRACTS)


def test_all_references_and_native_engines_have_their_contracts_signature() -> None:
    backend = bind(reference_plan())
    assert backend.norm.rms is import_pointer(str(CONTRACTS["norm.rms"].reference))
    assert backend.engine.rollout.__name__ == "NativeRollout"
    assert backend.attention.step is None


def test_every_bundled_offer_for_the_cpu_that_can_be_chosen_has_its_contracts_signature() -> None:
    catalogue = load()
    bound = 0
    for op, offers in catalogue.offers.items():
        for offer in (one for one in offers if one.impl.device in ("cpu", "*")):
            pick = Choice(
                op=op, chosen=offer.id, load=offer.impl.load, reason="test", contract=offer.impl.contract
            )
            bind(reference_plan(**{op.replace(".", "_", 1): pick}))
            bound += 1
    assert bound >= len(CONTRACTS) - 1


def test_a_bound_op_is_the_function_itself() -> None:
    backend = reference_backend()
    gate_up = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    gate, up = gate_up.double().chunk(2, -1)
    expected = gate / (1 + torch.exp(-gate)) * up
    # float32 keeps 24 bits: a handful of roundings on values of order 1.
    torch.testing.assert_close(backend.mlp.swiglu(gate_up).double(), expected, rtol=1e-6, atol=1e-6)
    assert backend.mlp.swiglu is import_pointer("grpo_core.ops.reference.fused:swiglu")


def test_the_backend_cannot_be_changed() -> None:
    backend = reference_backend()
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.norm = None  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.norm.rms = len  # type: ignore[misc]


def test_a_reference_backend_has_no_engines() -> None:
    with pytest.raises(PluginError, match="no engines"):
        reference_backend().engine.rollout(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (None, "ModuleNotFoundError: No module named 'acme_kernels.norm'"),
        ("", "AttributeError: module 'acme_kernels.norm' has no attribute 'rms'"),
        ("raise OSError('libacme.so: cannot open')", "OSError: libacme.so: cannot open"),
    ],
)
def test_a_pointer_that_cannot_be_imported_is_three_lines(acme: Path, code: str | None, why: str) -> None:
    if code is not None:
        (acme / "norm.py").write_text(code)
    with pytest.raises(PluginError) as raised:
        bind(reference_plan(norm_rms=row("norm.rms", "acme_kernels.norm:rms")))
    assert raised.value.what == "norm.rms: acme:fast cannot be imported from acme_kernels.norm:rms"
    assert raised.value.why == why and "plugin 'acme'" in raised.value.fix
    assert len(str(raised.value).splitlines()) == 3


def test_a_wrong_signature_stops_before_anything_runs(acme: Path) -> None:
    (acme / "norm.py").write_text("def rms(x, w, *, eps):\n    raise SystemExit\n")
    with pytest.raises(PluginError) as raised:
        bind(reference_plan(norm_rms=row("norm.rms", "acme_kernels.norm:rms")))
    assert "does not have the contract's signature" in raised.value.what
    assert raised.value.why.startswith(
        "parameter 'residual' is missing; wanted (x, w, *, eps, residual, zero_c"
    )
    assert len(str(raised.value).splitlines()) == 3


def test_a_class_lacking_a_method_stops(acme: Path) -> None:
    (acme / "memory.py").write_text("class Pool:\n    def stats(self): ...\n    def reset_peak(self): ...\n")
    with pytest.raises(PluginError) as raised:
        bind(reference_plan(memory_allocator=row("memory.allocator", "acme_kernels.memory:Pool")))
    assert raised.value.why == "it has no method pool"


def test_an_op_that_no_layer_needs_stops_only_who_calls_it() -> None:
    plan = reference_plan()
    backend = bind(replace(plan, choices=tuple(item for item in plan.choices if item.op != "rope.apply")))
    with pytest.raises(PluginError, match=r"rope\.apply was called, but the plan leaves it out") as raised:
        backend.rope.apply(None, None, None, None, interleaved=False)  # type: ignore[arg-type]
    assert raised.value.why == "this model does not need it"


def test_a_covered_op_that_is_called_all_the_same_says_which_op_covers_it() -> None:
    covered = Choice(op="attention.decode", chosen=None, load="", reason="-", covered_by="attention.step")
    backend = bind(reference_plan(attention_decode=covered))
    with pytest.raises(PluginError, match="the plan leaves it out") as raised:
        backend.attention.decode(None, None)  # type: ignore[arg-type, call-arg]
    assert raised.value.why == "attention.step covers it"


def test_an_optional_op_without_an_offer_stops_only_who_calls_it() -> None:
    unserved = Choice(
        op="attention.shared_prefix", chosen=None, load="", reason="optional, nothing serves it"
    )
    backend = bind(reference_plan(attention_shared_prefix=unserved))
    with pytest.raises(PluginError) as raised:
        backend.attention.shared_prefix(None, None, None)  # type: ignore[arg-type, call-arg]
    assert raised.value.why == "optional, nothing serves it"


def test_an_older_offer_is_adapted_to_the_newer_contract(acme: Path) -> None:
    (acme / "norm.py").write_text("def rms(x, w, *, eps, residual):\n    return (x, w, eps, residual)\n")
    contract = replace(CONTRACTS["norm.rms"], version=1, added={"zero_centered": (1, False)})
    plan = reference_plan(norm_rms=row("norm.rms", "acme_kernels.norm:rms", contract=0))
    rms: Any = bind(plan, contracts={**CONTRACTS, "norm.rms": contract}).norm.rms
    assert rms(1, 2, eps=3, residual=4, zero_centered=False) == (1, 2, 3, 4)
    with pytest.raises(PluginError, match=r"cannot serve zero_centered=True"):
        rms(1, 2, eps=3, residual=4, zero_centered=True)


def test_an_adapter_takes_a_tensor_for_what_it_is_not_neutral() -> None:
    adapted = adapt(lambda x: x, row("norm.rms", "a:b"), {"sinks": None})
    assert adapted(5, sinks=None) == 5
    with pytest.raises(PluginError, match="cannot serve sinks"):
        adapted(5, sinks=torch.zeros(2))


def test_an_adapter_keeps_hints_from_an_older_offer() -> None:
    adapted = adapt(lambda x: x, row("moe.experts", "a:b"), {"main_grad": None, "sinks": None}, {"main_grad"})
    assert adapted(5, main_grad=torch.zeros(2), sinks=None) == 5
    with pytest.raises(PluginError, match="cannot serve sinks"):
        adapted(5, main_grad=None, sinks=torch.zeros(2))


@pytest.mark.parametrize("op", ["loss.logprob", "moe.experts"])
def test_an_offer_from_before_main_grads_trains_through_autograd(op: str) -> None:
    contract = CONTRACTS[op]
    assert contract.version == 1 and contract.oldest == 0 and tuple(contract.added) == contract.hints
    assert all(version == 1 and neutral is None for version, neutral in contract.added.values())


def test_a_plan_from_the_resolver_binds() -> None:
    references = [
        Impl(
            op=op,
            name="reference",
            device="*",
            load=contract.reference,
            backward=True,
            rank=0,
            contract=contract.version,
        )
        for op, contract in CONTRACTS.items()
        if contract.reference
    ]
    needs = [Need(op=op, required=contract.reference is not None) for op, contract in CONTRACTS.items()]
    backend = bind(resolve(needs, catalogue_of({"core": references}), CPU))
    assert backend.loss.logprob is import_pointer(str(CONTRACTS["loss.logprob"].reference))


def test_a_bound_call_costs_less_than_one_and_a_half_direct_ones() -> None:
    def rms(x: Any, w: Any, *, eps: float, residual: Any, zero_centered: bool) -> Any:
        return x

    backend = replace(reference_backend(), norm=NormOps(rms=rms))
    call = "(1, 2, eps=1e-6, residual=None, zero_centered=False)"
    timers = [
        timeit.Timer(f"rms{call}", globals={"rms": rms}),
        timeit.Timer(f"backend.norm.rms{call}", globals={"backend": backend}),
    ]
    # The smallest of many interleaved rounds: what another process takes from one round is not the call's.
    rounds = [[timer.timeit(2000) for timer in timers] for _ in range(60)]
    direct, bound = (min(column) for column in zip(*rounds, strict=True))
    assert bound < 1.5 * direct, (bound, direct)
