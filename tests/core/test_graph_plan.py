"""Which steps can be recorded in device graphs, and what the plan says where one cannot."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_core.graph_plan import DECODE, NATIVE, graph_note, graph_refusal
from grpo_core.impl import DeviceInfo, Impl
from grpo_core.needs import RunFacts
from grpo_core.ops.contract import CONTRACTS
from grpo_core.plan import Choice, Plan

FACTS = RunFacts(train_dtype="float32", rollout_dtype="float32")
CHIP = DeviceInfo(type="acme", features=frozenset({"graphs"}))
STEP = ("attention.cache", "attention.decode", "norm.rms", "rope.apply", "mlp.swiglu", "linear.packed")


def asked(*ops: str, unable: tuple[str, ...] = (), device: DeviceInfo = CHIP, engine: str = NATIVE,
          facts: RunFacts = FACTS, setting: str = "auto", covered: str = "") -> str | None:  # fmt: skip
    rows = [Choice(op=op, chosen="acme:fast", load="", reason="",
                   covered_by="attention.step" if op == covered else None) for op in ops]  # fmt: skip
    rows.append(Choice(op="engine.rollout", chosen=engine, load="", reason=""))
    plan = Plan(device=device, choices=tuple(rows), plugins=(), fallback="none")

    def offer(op: str, offer_id: str) -> Any:
        impl = Impl(op=op, name="fast", device="acme", load="", graph=op not in unable)
        return SimpleNamespace(impl=impl)

    catalogue: Any = SimpleNamespace(offer=offer)
    return graph_refusal(plan, catalogue, facts, setting)


def test_a_step_whose_every_op_can_be_recorded_is() -> None:
    assert asked(*STEP) is None
    assert graph_note(None) == ("decode steps are recorded in device graphs (rollout.graph)",)


@pytest.mark.parametrize("op", STEP)
def test_an_op_that_cannot_is_named(op: str) -> None:
    refusal = asked(*STEP, unable=(op,))
    assert refusal == f"{op} (acme:fast) does not offer graph"
    assert graph_note(refusal) == (f"decode steps are not recorded in device graphs: {refusal}",)


def test_several_that_cannot_are_all_named() -> None:
    assert asked(*STEP, unable=("norm.rms", "mlp.swiglu")) == (
        "norm.rms (acme:fast), mlp.swiglu (acme:fast) do not offer graph"
    )


def test_ops_outside_of_a_step_may_wait_for_the_host() -> None:
    outside = ("sample.token", "attention.prefill", "attention.varlen", "loss.logprob", "optim.adamw")
    assert asked(*STEP, *outside, unable=outside) is None
    assert set(DECODE) <= set(CONTRACTS) and not set(DECODE) & set(outside)


def test_what_a_fused_step_covers_is_not_asked() -> None:
    assert asked(*STEP, "attention.step", covered="attention.decode",
                 unable=("attention.decode", "rope.apply")) is None  # fmt: skip
    latent = ("mla.cache", "mla.decode", "rope.apply", "attention.step")
    assert asked(*latent, unable=("rope.apply",)) is not None


def test_consistent_routers_multiply_with_the_dense_op() -> None:
    routed = (*STEP, "moe.route", "linear.dense")
    assert asked(*routed, unable=("linear.dense",)) is None
    consistent = replace(FACTS, consistent=True)
    assert asked(*routed, unable=("linear.dense",), facts=consistent) == (
        "linear.dense (acme:fast) does not offer graph"
    )


def test_nothing_is_said_where_there_are_no_graphs() -> None:
    assert asked(*STEP, device=replace(CHIP, features=frozenset())) == ""
    assert asked(*STEP, engine="vllm:vllm") == "" and graph_note("") == ()
    assert asked(*STEP, setting="off") == "rollout.graph is off"
