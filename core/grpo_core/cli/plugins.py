"""`grpo plugins [--matrix] [--json]`: what is installed, what it offers, what failed."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..catalogue import Catalogue, Offer
from ..ops.contract import CONTRACTS
from ..plugins import load
from ..requirements import unmet
from .table import print_table

PROOF = {
    "audited": "its calls were held against the vendor's signatures, nothing was run",
    "simulated": "the conformance suite passed on the vendor's package over a simulated chip",
    "hardware": "the conformance suite passed on the chip",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo plugins`."""
    parser.add_argument("--matrix", action="store_true", help="ops by devices, present or not")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print plugins and failures; returns 1 when a plugin failed."""
    catalogue = load()
    if args.json:
        content = {
            "plugins": listing(catalogue),
            "failures": failures(catalogue),
            "matrix": matrix(catalogue),
        }
        print(json.dumps(content, indent=1))
        return 1 if catalogue.failures else 0
    if args.matrix:
        _print_matrix(catalogue)
    else:
        _print_listing(catalogue)
    for failure in catalogue.failures:
        print(f"\nfailed: {failure}\n  fix: {failure.fix}")
    return 1 if catalogue.failures else 0


def _print_matrix(catalogue: Catalogue) -> None:
    table = matrix(catalogue)
    devices = sorted({device for row in table.values() for device in row})
    lacks: dict[str, int] = {}
    cells = []
    for op, row in table.items():
        cells.append([op, *(", ".join(_short(cell, lacks) for cell in row.get(name, ())) or "-"
                            for name in devices)])  # fmt: skip
    print_table(["op", *devices], cells)
    print("\noffers in the order in which the plan prefers them; * serves every device")
    for reason, number in lacks.items():
        print(f"({number}) {reason}")
    for level, meaning in PROOF.items():
        print(f"[{level}] {meaning}")


def _short(cell: str, lacks: dict[str, int]) -> str:
    """A cell with the number of a footnote in place of what the offer lacks here."""
    name, _, reason = cell.removesuffix(")").partition(" (")
    return f"{name} ({lacks.setdefault(reason, len(lacks) + 1)})" if reason else cell


def _print_listing(catalogue: Catalogue) -> None:
    rows = []
    for row in listing(catalogue):
        source = f"{row['distribution']} {row['version']}"
        hooks = ", ".join(hook.removeprefix("grpo_") for hook in row["hooks"])
        rows.append([row["id"], source, str(row["offers"]), ", ".join(row["brings"]) or "-", hooks])
    print_table(["plugin", "distribution", "offers", "brings", "hooks"], rows)


def listing(catalogue: Catalogue) -> list[dict[str, Any]]:
    """One row a plugin: where it comes from and what it brings."""
    rows = []
    for plugin in catalogue.plugins:
        offers = [
            offer for listed in catalogue.offers.values() for offer in listed if offer.plugin == plugin.id
        ]
        brings = sorted(key for key, owner in catalogue.owners.items() if owner == plugin.id)
        named = [
            f"{kind}:{name}"
            for kind, table in catalogue.registry.tables.items()
            for name, (owner, _) in sorted(table.items())
            if owner == plugin.id
        ]
        rows.append(
            {
                "id": plugin.id,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "module": plugin.module,
                "hooks": list(plugin.hooks),
                "offers": len(offers),
                "brings": brings + named,
            }
        )
    return rows


def failures(catalogue: Catalogue) -> list[dict[str, str]]:
    """The failures as plain data."""
    return [
        {
            "plugin": failure.plugin,
            "distribution": failure.distribution,
            "where": failure.where,
            "error": failure.error,
            "fix": failure.fix,
            "trace": failure.trace,
        }
        for failure in catalogue.failures
    ]


def matrix(catalogue: Catalogue) -> dict[str, dict[str, list[str]]]:
    """Op -> device type -> offers by falling rank, for every op and every device that any plugin knows."""
    table: dict[str, dict[str, list[str]]] = {}
    for op in CONTRACTS:
        row: dict[str, list[str]] = {}
        for offer in sorted(catalogue.offers.get(op, ()), key=lambda offer: (-offer.impl.rank, offer.id)):
            row.setdefault(offer.impl.device, []).append(_cell(offer))
        table[op] = row
    for device in catalogue.devices.values():
        for row in table.values():
            row.setdefault(device.type, [])
    return table


def _cell(offer: Offer) -> str:
    lacking = [reason for reason in map(unmet, offer.impl.requires) if reason]
    proof = f" [{offer.impl.proof}]" if offer.impl.proof else ""
    return offer.id + proof + (f" ({lacking[0]})" if lacking else "")
