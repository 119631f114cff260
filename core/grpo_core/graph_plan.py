"""Whether the decode steps of a run can be recorded in device graphs, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .devices.graphs import FEATURE

if TYPE_CHECKING:
    from .catalogue import Catalogue
    from .needs import RunFacts
    from .plan import Choice, Plan

AUTO = "auto"
NATIVE = "core:native"
DECODE = (
    "attention.cache", "attention.decode", "attention.step", "mla.cache", "mla.decode", "gated_delta.step",
    "short_conv.step", "moe.route", "moe.dispatch", "moe.experts", "moe.combine", "moe.layer", "norm.rms",
    "rope.apply", "mlp.swiglu", "linear.packed",
)  # fmt: skip
"""Ops of a decode step, each where the model needs it; sampling waits for the host and stays outside."""


def graph_refusal(plan: Plan, catalogue: Catalogue, facts: RunFacts, setting: str) -> str | None:
    """Why decode is not recorded in graphs on a device that has them, in words; None where it is.

    The empty string where there is nothing to say: the device has no graphs, or another engine decodes.
    """
    engine = next((row.chosen for row in plan.choices if row.op == "engine.rollout"), None)
    if FEATURE not in plan.device.features or engine != NATIVE:
        return ""
    if setting != AUTO:
        return f"rollout.graph is {setting}"
    rows = {row.op: row for row in plan.choices if row.chosen and not row.covered_by}
    # Consistent runs multiply by the router's weights with the dense op.
    wanted: tuple[str, ...] = (
        (*DECODE, "linear.dense") if facts.consistent and "moe.route" in rows else DECODE
    )
    if "attention.step" in rows and "mla.decode" not in rows:
        wanted = tuple(op for op in wanted if op != "rope.apply")
    refusing = [f"{op} ({rows[op].chosen})" for op in wanted if op in rows and not _able(rows[op], catalogue)]
    if not refusing:
        return None
    return f"{', '.join(refusing)} {'does' if len(refusing) == 1 else 'do'} not offer graph"


def _able(row: Choice, catalogue: Catalogue) -> bool:
    offer = catalogue.offer(row.op, row.chosen or "")
    return offer is not None and offer.impl.graph


def graph_note(refusal: str | None) -> tuple[str, ...]:
    """What the plan says of it."""
    if refusal is None:
        return ("decode steps are recorded in device graphs (rollout.graph)",)
    return (f"decode steps are not recorded in device graphs: {refusal}",) if refusal else ()
