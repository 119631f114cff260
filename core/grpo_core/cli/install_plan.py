"""`grpo doctor --device X --install-plan`: the commands for a tested row, as a script for a POSIX shell."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterator
from typing import Any

from ..devices.doctor import Row, Step

MACHINES = ("x86_64", "aarch64")
ALIASES = {"arm64": "aarch64", "amd64": "x86_64", "AMD64": "x86_64"}
"""What other systems call the same processors."""
WIDTH = 110


def this_machine() -> str:
    """The processor of this host, as Linux names it."""
    machine = platform.machine()
    return ALIASES.get(machine, machine)


def script(row: Row, device: str, machine: str) -> str:
    """The whole text. It stops at the first failure where it is run by `sh -e`."""
    proof = f" ({row.proof})" if row.proof else ""
    versions = ", ".join(f"{key} {value}" for key, value in row.versions.items() if value)
    lines = [
        f"# {device}, row {row.name}{proof}, for {machine}",
        *_comment(versions),
        *_comment(row.basis),
        *_comment("For an environment on the host that has grpo-core; by hand, or piped to `sh -ex`."),
        f"constraints=$({_finder(row.constraints)})",
    ]  # fmt: skip
    for number, step in enumerate(steps_of(row, machine), 1):
        lines += ["", *_comment(f"{number}. {'Optional. ' * step.optional}{step.why}")]
        if step.command:
            lines.append(f"# $ {step.command}" if step.optional else step.command)
    return "\n".join([*lines, "", f"grpo doctor --device {device}", ""])


def steps_of(row: Row, machine: str) -> list[Step]:
    """The steps of a row on one kind of processor."""
    return [step for step in row.steps if step.machine in ("", machine)]


def plan_json(row: Row, device: str, machine: str) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "device": device,
        "row": row.name,
        "proof": row.proof,
        "machine": machine,
        "constraints": row.constraints,
        "steps": [
            {"command": step.command, "why": step.why, "optional": step.optional}
            for step in steps_of(row, machine)
        ],
    }


def _finder(constraints: str) -> str:
    """A command that prints where the file is installed; it imports nothing heavy."""
    package, _, rest = constraints.partition("/")
    return f'python -c \'from importlib.resources import files; print(files("{package}") / "{rest}")\''


def _comment(text: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="#   ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
