"""The plan: which offer serves each op and why, and which offers were passed over and why.

A plan is data. It is written to the run folder as `plan.json`, read back, compared and replayed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PlanError
from .impl import DeviceInfo

SCHEMA = 1
"""Version of plan.json; another one is refused."""
NONE = "none"
"""Pin that leaves an optional op unserved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passed:
    """An offer that was not chosen."""

    id: str
    reason: str
    fits: bool
    """True where it could serve the op and only its rank was lower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One row of the plan."""

    op: str
    chosen: str | None
    """Id of the offer; None for an optional op that nothing serves."""
    load: str
    """Pointer that `bind` imports; empty with `chosen` None."""
    reason: str
    rank: int = 0
    contract: int = 0
    """Contract version that the offer was written for."""
    pinned: bool = False
    fallback: bool = False
    """A reference that serves a device other than cpu because the config allows it."""
    covered_by: str | None = None
    """Op whose chosen offer does this one's work."""
    facts: tuple[Mapping[str, object], ...] = ()
    """What was asked; more than one where layers or roles differ."""
    passed: tuple[Passed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginVersion:
    """A plugin that was loaded when the plan was made."""

    id: str
    distribution: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The resolved table."""

    device: DeviceInfo
    choices: tuple[Choice, ...]
    """By op."""
    plugins: tuple[PluginVersion, ...]
    fallback: str
    notes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Eight hex digits over what will run: device type, choices, pointers and plugin versions."""
        used = {choice.chosen.partition(":")[0] for choice in self.choices if choice.chosen}
        content = [
            SCHEMA,
            self.device.type,
            [[choice.op, choice.chosen, choice.load, choice.contract] for choice in self.choices],
            [
                [plugin.id, plugin.distribution, plugin.version]
                for plugin in self.plugins
                if plugin.id in used
            ],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]

    def choice(self, op: str) -> Choice:
        """The row of an op. Raises `PlanError` when the plan has none."""
        for choice in self.choices:
            if choice.op == op:
                return choice
        raise PlanError(
            f"the plan has no row for {op}",
            why="nothing needed it when the plan was made",
            fix="plan again with `grpo plan`",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data with a stable order of keys; `from_json` gives an equal plan back."""
        content = dataclasses.asdict(self)
        for name in ("dtypes", "features"):
            content["device"][name] = sorted(content["device"][name])
        return {"schema": SCHEMA, "id": self.id, **content}

    def save(self, path: Path) -> None:
        """Write plan.json, whole or not at all."""
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)


def from_json(content: Any, *, where: str = "plan.json") -> Plan:
    """A plan from `Plan.to_json`. Raises `PlanError` on another schema or damaged content."""
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, Mapping) else type(content).__name__
        raise PlanError(
            f"{where} is not a plan of this version",
            why=f"schema {found!r}, this grpo-core reads {SCHEMA}",
            fix="make it again with `grpo plan run.yaml --json > plan.json`",
        )
    try:
        device = dict(content["device"])
        device.update({name: frozenset(device[name]) for name in ("dtypes", "features")})
        plan = Plan(
            device=DeviceInfo(**device),
            choices=tuple(_choice(row) for row in content["choices"]),
            plugins=tuple(PluginVersion(**row) for row in content["plugins"]),
            fallback=content["fallback"],
            notes=tuple(content["notes"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(where, f"{type(error).__name__}: {error}") from error
    if plan.id != content.get("id"):
        raise _damaged(where, f"its id is {content.get('id')!r}, its content gives {plan.id!r}")
    return plan


def _choice(row: Mapping[str, Any]) -> Choice:
    passed = tuple(Passed(**item) for item in row["passed"])
    facts = tuple(dict(item) for item in row["facts"])
    return Choice(**{**row, "passed": passed, "facts": facts})


def _damaged(where: str, why: str) -> PlanError:
    return PlanError(f"{where} is damaged or was edited", why=why, fix="make it again with `grpo plan`")


def load_plan(path: Path) -> Plan:
    """Read plan.json. Raises `PlanError` when it is absent, damaged or of another schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"cannot read {path}", why=str(error), fix="give the plan.json of a run") from error
    except ValueError as error:
        raise _damaged(str(path), f"not JSON: {error}") from error
    return from_json(content, where=str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that two plans do not share."""

    what: str
    """An op, "device", "fallback" or "plugin <id>"."""
    before: str
    after: str


def diff(before: Plan, after: Plan) -> tuple[Difference, ...]:
    """What changed from one plan to another, in what will run; reasons and passed offers do not count."""
    sides = [_rows(before), _rows(after)]
    names = dict.fromkeys([*sides[0], *sides[1]])
    pairs = ((name, sides[0].get(name, "absent"), sides[1].get(name, "absent")) for name in names)
    return tuple(Difference(what=name, before=a, after=b) for name, a, b in pairs if a != b)


def _rows(plan: Plan) -> dict[str, str]:
    rows = {"device": f"{plan.device.type} {plan.device.name}".strip(), "fallback": plan.fallback}
    for choice in plan.choices:
        cover = f", covered by {choice.covered_by}" if choice.covered_by else ""
        rows[choice.op] = f"{choice.chosen or NONE}{cover}"
    for plugin in plan.plugins:
        rows[f"plugin {plugin.id}"] = f"{plugin.distribution} {plugin.version}".strip()
    return rows
