"""`grpo plan run.yaml [key=value ...]`: which offer serves each op and why, before anything is imported.

`grpo plan MODEL_FOLDER` tells a model's size alone; a config.json in the folder is enough.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..config_loader import LoadedConfig, load_config
from ..model.arch import Arch, MoE
from ..model.hf_config import read_hf_config
from ..plan import Choice, Plan, diff, load_plan
from ..planning import PlannedRun, plan_run
from ..plugins import load
from . import sizes
from .table import print_table


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo plan`."""
    parser.add_argument("config", type=Path, help="YAML file, or a model folder for its size alone")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file"
    )
    parser.add_argument(
        "--why", action="store_true", help="also show what was asked and the offers passed over"
    )
    parser.add_argument("--json", action="store_true", help="print plan.json instead of a table")
    parser.add_argument("--config", dest="settings", action="store_true",
                        help="also show each setting and where it comes from")  # fmt: skip
    parser.add_argument(
        "--against", type=Path, metavar="PLAN.JSON", help="show what differs from another plan"
    )
    parser.add_argument(
        "--plan", type=Path, metavar="PLAN.JSON", help="pin every op to another plan's choice"
    )
    sizes.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan; returns 0. A plan that cannot be made is a `GrpoError`."""
    if args.config.is_dir():
        return _run_folder(args)
    loaded = load_config(args.config, args.overrides)
    planned = plan_run(loaded, earlier=load_plan(args.plan) if args.plan else None, weights=False,
                       absent=True)  # fmt: skip
    other = load_plan(args.against) if args.against else None
    size = sizes.size_json(planned.arch, sizes.layout_of(args), planned.facts.train_dtype)
    if args.json:
        content = {**planned.plan.to_json(), "size": size}
        if args.settings:
            fixed = list(fixed_rules(planned.arch))
            content = {"plan": content, "config": settings(planned.loaded), "fixed": fixed}
        print(json.dumps(content, indent=1))
        return 0
    _print_head(planned)
    _print_rows(planned.plan, why=args.why)
    _print_notes(planned)
    print()
    sizes.print_size(size)
    if other is not None:
        _print_diff(other, planned.plan)
    if args.settings:
        rows = [
            [key, json.dumps(row["value"]), row["source"]] for key, row in settings(planned.loaded).items()
        ]
        print()
        print_table(["setting", "value", "from"], rows)
        for rule in fixed_rules(planned.arch):
            print(f"fixed: {rule}")
    return 0


def fixed_rules(arch: Arch) -> Iterator[str]:
    """What holds in every run of such a model, without a setting."""
    mixtures = [layer.ffn for layer in arch.layers if isinstance(layer.ffn, MoE)]
    if mixtures:
        yield "no balancing loss is added: in RL it moves the routing that the policy was sampled with"
    if any(ffn.selection_bias for ffn in mixtures):
        yield "selection biases take part in choosing experts, in float32, and are never updated"
    if arch.hf_config.get("quantization_config"):
        yield "float8 weights are dequantised while they are read; nothing is trained or exported quantised"


def _run_folder(args: argparse.Namespace) -> int:
    config = read_hf_config(args.config)
    family = load().model_plugin_for(config.get("architectures") or ())
    arch = family.arch(config)
    size = sizes.size_json(arch, sizes.layout_of(args), "bfloat16")
    if args.json:
        print(json.dumps({"family": family.name, "size": size}, indent=1))
        return 0
    print(f"model   {args.config} ({family.name}, {len(arch.layers)} layers)\n")
    sizes.print_size(size)
    return 0


def settings(loaded: LoadedConfig) -> dict[str, dict[str, Any]]:
    """Every setting by its dotted key, with its value and source."""
    return {
        key: {"value": value_at(loaded.config, key), "source": source}
        for key, source in sorted(loaded.sources.items())
    }


def value_at(config: Config, dotted: str) -> Any:
    """The value of a dotted key; the key of a mapping may hold dots itself (`ops.attention.varlen`)."""
    place: Any = config.model_dump()
    rest = dotted
    while rest:
        if isinstance(place, Mapping) and rest in place:
            return place[rest]
        head, _, rest = rest.partition(".")
        place = place[int(head)] if isinstance(place, list) else place[head]
    return place


def _print_head(planned: PlannedRun) -> None:
    info = planned.info
    count = f" x{info.count}" if info.count > 1 else ""
    facts = planned.facts
    print(f"model   {planned.config.model} ({planned.family.name}, {len(planned.arch.layers)} layers)")
    paper = ", not here: planned on paper" if planned.on_paper else ""
    print(f"device  {planned.device.name} ({info.name or info.type}{count}{paper})")
    print(f"dtype   train {facts.train_dtype}, rollout {facts.rollout_dtype}")
    if facts.consistent:
        print("mode    consistent: offers that are not batch-invariant are passed over (see --why)")
    print(f"plan    {planned.plan.id}\n")


def _print_rows(plan: Plan, *, why: bool) -> None:
    rows = []
    for choice in plan.choices:
        rows.append(
            [choice.op, choice.chosen or "-", str(choice.rank) if choice.chosen else "", _reason(choice)]
        )
        if why:
            rows += [["", "asked", "", _spell(facts)] for facts in choice.facts if facts]
            rows += [
                ["", f"{'~' if item.fits else 'x'} {item.id}", "", item.reason] for item in choice.passed
            ]
    print_table(["op", "served by", "rank", "why"], rows)
    fallbacks = sum(choice.fallback for choice in plan.choices)
    unserved = sum(choice.chosen is None for choice in plan.choices)
    print(f"\n{fallbacks} fallback(s), {unserved} optional op(s) unserved")


def _reason(choice: Choice) -> str:
    # The rank has a column of its own.
    return choice.reason.removeprefix(f"rank {choice.rank}").removeprefix(", ") or "the only one that fits"


def _spell(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in facts.items())


def _print_notes(planned: PlannedRun) -> None:
    for note in planned.plan.notes:
        print(f"note: {note}")
    for warning in planned.loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for failure in planned.catalogue.failures:
        print(f"warning: {failure}\n  fix: {failure.fix}", file=sys.stderr)


def _print_diff(other: Plan, plan: Plan) -> None:
    differences = diff(other, plan)
    print()
    if not differences:
        print(f"no differences to plan {other.id}")
        return
    rows = [[item.what, item.before, item.after] for item in differences]
    print_table(["differs", f"plan {other.id}", f"plan {plan.id}"], rows)
