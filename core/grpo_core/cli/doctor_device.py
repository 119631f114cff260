"""What `grpo doctor` says of one device (`--device`), and of the versions that were tested (`--matrix`)."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..devices.doctor import BROKEN, MISSING, OK, Check, Row, checks_of, rows_of
from ..devices.pick import known_device, probe
from .table import print_table

if TYPE_CHECKING:
    from ..catalogue import Catalogue
    from ..devices.base import Device

COLOURS: Mapping[str, str] = {"ok": "green", "missing": "red", "wrong": "red", "advice": "yellow"}
UNTESTED = "-"
"""Shown for a row whose proof is empty."""
PROOFS: Mapping[str, str] = {
    "audited": "the plugin's calls were held against the signatures of these versions; nothing was run",
    "simulated": "what the basis names ran on these versions, over a simulated chip or an interpreter",
    "hardware": "the conformance suite passed on the chip with these versions",
}
"""What is claimed of a row."""


def examine_device(name: str, catalogue: Catalogue) -> dict[str, Any]:
    """All that is known of one device on this host, as plain data.

    Raises `ConfigError` where no plugin knows it.
    """
    device = known_device(name, catalogue)
    said = probe(device)
    checks = list(checks_of(device))
    if not checks:
        checks = [_probed(said.found, said.reason)]
    return {
        "device": device.name,
        "plugin": catalogue.owners[f"device:{device.name}"],
        "found": said.found,
        "product": said.info.name,
        "count": said.info.count,
        "checks": [
            {"part": one.part, "status": one.status, "why": one.why, "fix": one.fix} for one in checks
        ],
        "usable": said.found and not any(one.status in BROKEN for one in checks),
    }


def _probed(found: bool, reason: str) -> Check:
    """The one line of a device whose plugin brings no checks."""
    fix = "" if found else "see the page of its plugin: it brings no checks of its own"
    return Check(part="device", status=OK if found else MISSING, why=reason, fix=fix)


def print_device(content: Mapping[str, Any]) -> None:
    """The checks, each with its status, why and fix, as wide as the terminal."""
    state = "found" if content["found"] else "not usable here"
    print(f"{content['device']} ({content['product']}, plugin {content['plugin']}): {state}\n")
    wide = max(len(one["part"]) for one in content["checks"])
    width = shutil.get_terminal_size((110, 24)).columns
    for one in content["checks"]:
        head = f"{one['status']:<8} {one['part']:<{wide}}  "
        _say(_wrap(one["why"], head, width), one["status"])
        if one["fix"]:
            print(_wrap(f"fix: {one['fix']}", " " * len(head), width))
    broken = sum(one["status"] in BROKEN for one in content["checks"])
    advice = sum(one["status"] == "advice" for one in content["checks"])
    print(f"\n{broken} to mend, {advice} to think about")


def _wrap(text: str, head: str, width: int) -> str:
    # Commands are copied from here: no word of them may be cut.
    return textwrap.fill(
        text, max(width, len(head) + 40), initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _say(text: str, status: str) -> None:
    """A line that begins with its status, which has a colour on a terminal."""
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    line = Text(text)
    line.stylize(COLOURS.get(status, "dim"), 0, len(status))
    Console(soft_wrap=True).print(line)


def matrix(catalogue: Catalogue, name: str = "") -> dict[str, list[Row]]:
    """Device -> its tested rows; of one device when named. Raises `ConfigError` for no such device."""
    if name:
        devices: Sequence[Device] = [known_device(name, catalogue)]
    else:
        devices = [device for _, device in sorted(catalogue.devices.items())]
    table = {device.name: list(rows_of(device)) for device in devices}
    return {key: rows for key, rows in table.items() if rows or name}


def matrix_json(table: Mapping[str, Sequence[Row]]) -> dict[str, list[dict[str, Any]]]:
    """The rows as plain data, without their steps."""
    return {
        device: [
            {"row": row.name, "versions": dict(row.versions), "proof": row.proof, "basis": row.basis}
            for row in rows
        ]
        for device, rows in table.items()
    }


def print_matrix(table: Mapping[str, Sequence[Row]]) -> None:
    """One table a device, its first row the recommended one, and what each proof rests on."""
    for device, rows in table.items():
        if not rows:
            print(f"{device}: its plugin names no tested rows\n")
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row.versions))
        cells = [
            [row.name, row.proof or UNTESTED, *(row.versions.get(key, "") for key in columns)] for row in rows
        ]
        print(f"device {device}")
        print_table(["row", "proof", *columns], cells)
        print()
        for row in rows:
            print(_wrap(row.basis, f"{row.name}: ", shutil.get_terminal_size((110, 24)).columns))
        print()
    for level, meaning in PROOFS.items():
        print(f"[{level}] {meaning}")
    print("the commands for a row: grpo doctor --device DEVICE --install-plan --row ROW")
