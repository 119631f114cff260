"""What of a vendor's package a plugin may call, version by version: data, shipped with the plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from grpo_core.errors import ConfigError

from .signatures import Signature, parse

SCHEMA = "grpo/vendor-surface/1"
SURFACE, RULES = "vendor_surface.json", "vendor_rules.json"
"""Files beside a plugin's modules: made by `extract`, and written by hand from the vendor's documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op of one version."""

    signatures: tuple[Signature, ...]
    """Its overloads; none where it is known to exist and no more (a class made in C++)."""
    gradient: bool
    """Whether autograd has a formula for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the documentation asks beyond the signature."""

    explicit: tuple[str, ...] = ()
    """Arguments that must be given, because versions differ in their defaults."""
    values: Mapping[str, tuple[Any, ...]]
    """Argument -> values that it may have, held against literals."""
    together: tuple[Mapping[str, Any], ...] = ()
    """{"when": {argument: value or null for any}, "given": [arguments], "why": ...}."""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """A vendor's package as far as it is known."""

    distribution: str
    roots: tuple[str, ...]
    """Dotted names under which ops are called: "torch_npu", "torch.ops.npu"."""
    versions: tuple[str, ...]
    ops: Mapping[str, Mapping[str, Op]]
    """Version -> name after the root -> op."""
    rules: Mapping[str, Rule]

    def admitted(self, requires: Sequence[str]) -> tuple[str, ...]:
        """The known versions that these requirements let in; none of them where they do not name it."""
        mine = [one for one in map(Requirement, requires) if one.name == self.distribution]
        if not mine:
            return ()
        return tuple(
            version
            for version in self.versions
            if all(one.specifier.contains(version, prereleases=True) for one in mine)
        )


def load(folder: Path) -> Surface:
    """The surface beside a plugin's modules. Raises `ConfigError` where there is none, or a broken one."""
    try:
        content = json.loads((folder / SURFACE).read_text(encoding="utf-8"))
        rules = json.loads((folder / RULES).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, this suite reads {SCHEMA!r}")
        versions = tuple(sorted(content["wheels"], key=Version))
        return Surface(
            distribution=content["distribution"],
            roots=tuple(content["roots"]),
            versions=versions,
            ops={version: _ops(content["ops"], version) for version in versions},
            rules={name: _rule(row) for name, row in rules["rules"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no surface of a vendor to audit against",
            why=f"{type(error).__name__}: {error}",
            fix=f"make {SURFACE} with `python -m grpo_conformance.audit.extract`, and write {RULES}",
        ) from error


def _ops(table: Mapping[str, Sequence[Mapping[str, Any]]], version: str) -> dict[str, Op]:
    return {
        name: Op(signatures=tuple(map(parse, row["signatures"])), gradient=row["gradient"])
        for name, rows in table.items()
        for row in rows
        if version in row["versions"]
    }


def _rule(row: Mapping[str, Any]) -> Rule:
    return Rule(
        explicit=tuple(row.get("explicit", ())),
        values={name: tuple(allowed) for name, allowed in row.get("values", {}).items()},
        together=tuple(row.get("together", ())),
        source=row.get("source", ""),
    )
