"""From a configuration to a plan: everything that is decided before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from .catalogue import Catalogue
from .config import Config
from .config_loader import LoadedConfig, merge_recipe
from .devices.base import Device
from .devices.pick import pick_device, probe
from .errors import ConfigError, PlanError
from .graph_plan import graph_note, graph_refusal
from .impl import DeviceInfo
from .model.arch import Arch
from .model.hf_config import read_hf_config
from .model.plugin import ModelPlugin
from .model.source import resolve_model
from .needs import RunFacts, facts_of, needs_of
from .plan import Plan
from .plugins import load
from .requirements import required_name
from .resolve import replay, resolve

TOGETHER = (
    (
        "attention.varlen",
        "attention.shared_prefix",
        "attention.prefill",
        "attention.decode",
        "attention.step",
    ),
    ("mla.varlen", "mla.prefill", "mla.decode"),
    ("gated_delta.chunk", "gated_delta.step"),
    ("short_conv.varlen", "short_conv.step"),
    ("linear.dense", "linear.packed", "loss.logprob", "sample.token"),
)
"""Ops between which one sequence goes back and forth in a consistent run: one offer serves all of a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run whose every op has its implementation, nothing of it imported yet."""

    loaded: LoadedConfig
    catalogue: Catalogue
    model_path: Path
    family: ModelPlugin
    arch: Arch
    device: Device
    info: DeviceInfo
    facts: RunFacts
    plan: Plan
    on_paper: bool = False
    """The device is not here: the plan tells what would run where it is."""
    graph: bool = False
    """Decode steps of the native engine are recorded in device graphs."""

    @property
    def config(self) -> Config:
        """The settings with the family's recipe below them."""
        return self.loaded.config

    def packages(self) -> list[str]:
        """Distributions that the chosen offers come from or require, such as a chip's build of torch."""
        owners = {info.id: info.distribution for info in self.catalogue.plugins}
        found = set()
        for choice in self.plan.choices:
            offer = self.catalogue.offer(choice.op, choice.chosen or "")
            if offer is not None:
                found.add(owners.get(offer.plugin))
                found |= {required_name(requirement) for requirement in offer.impl.requires}
        return sorted(name for name in found if name)


def plan_run(
    loaded: LoadedConfig, *, earlier: Plan | None = None, world: int = 1, weights: bool = True,
    absent: bool = False, catalogue: Catalogue | None = None,
) -> PlannedRun:  # fmt: skip
    """Plan a run; with `earlier` every op is pinned to that plan's choice. Without `weights` those of a
    model on the hub are not downloaded: a plan needs its config.json only. With `absent` a device that is
    not here is planned for on paper. `catalogue` stands for the installed plugins.

    Raises the `GrpoError` of whatever does not fit: model, family, device, op or pin.
    """
    config = loaded.config
    one_device(config)
    catalogue = load(off=config.plugins_off) if catalogue is None else catalogue
    device, info = pick_device(config.device, catalogue, absent=absent)
    said = probe(device)
    model_path = resolve_model(config.model, weights=weights)
    hf_config = read_hf_config(model_path)
    family = catalogue.model_plugin_for(hf_config.get("architectures") or ())
    arch = family.arch(hf_config)
    loaded = merge_recipe(loaded, family.recipe(arch, info, world), family.name)
    facts = facts_of(loaded.config, info, world=world)
    needs, pins = needs_of(arch, facts), dict(loaded.config.ops)
    for op, engine in (
        ("engine.rollout", loaded.config.rollout.engine),
        ("engine.train", loaded.config.train.engine),
    ):
        pins.setdefault(op, engine_pin(catalogue, op, engine))
    if earlier is None:
        plan = resolve(
            needs, catalogue, info, pins=pins, fallback=loaded.config.fallback, on_paper=not said.found
        )
    else:
        plan = replay(earlier, needs, catalogue, info, pins=pins)
    if not said.found:
        why = f"on paper: device {device.name} is not here ({said.reason})"
        plan = replace(plan, notes=(why, *plan.notes))
    if facts.consistent:
        refuse_mixtures(plan)
    why_not = graph_refusal(plan, catalogue, facts, loaded.config.rollout.graph)
    plan = replace(plan, notes=(*plan.notes, *graph_note(why_not)))
    return PlannedRun(
        loaded=loaded, catalogue=catalogue, model_path=model_path, family=family, arch=arch, device=device,
        info=info, facts=facts, plan=plan, on_paper=not said.found, graph=why_not is None,
    )  # fmt: skip


def refuse_mixtures(plan: Plan) -> None:
    """Raises `PlanError` where ops that must give the same bits are served by different offers."""
    rows = {row.op: row for row in plan.choices if row.chosen and not row.covered_by}
    for ops in TOGETHER:
        chosen = {op: rows[op].chosen for op in ops if op in rows}
        if len(set(chosen.values())) > 1:
            raise PlanError(
                f"consistent: true cannot mix the offers of {', '.join(chosen)}",
                why="; ".join(f"{op} is served by {offer}" for op, offer in chosen.items())
                + ": each is batch-invariant, but two implementations round differently",
                fix="pin the same offer for all of them under `ops:`",
            )


def engine_pin(catalogue: Catalogue, op: str, engine: str) -> str:
    """The offer id of an engine given by its name ("native") or its id ("core:native")."""
    offers = catalogue.offers.get(op, ())
    named = [offer.id for offer in offers if engine in (offer.impl.name, offer.id)]
    if len(named) == 1:
        return named[0]
    key = op.replace("engine.", "") + ".engine"
    raise ConfigError(
        f"{key} {engine!r} {'is offered by several plugins' if named else 'is not installed'}",
        why=f"offered: {', '.join(named or [offer.id for offer in offers])}",
        fix=f"set {key} to one of them",
    )


def one_device(config: Config) -> None:
    """Refuse roles on different devices, which need one process each."""
    named = {name for name in (config.roles.rollout, config.roles.train) if name}
    if named - {config.device}:
        raise ConfigError(
            "roles on different devices cannot run yet",
            why="a process drives one kind of accelerator, and this release runs one process",
            fix="remove `roles`, or set both to the value of `device`",
        )
