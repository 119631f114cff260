"""What of a vendor's packages a plugin may call, version by version: data, shipped with the plugin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from grpo_core.errors import ConfigError

from .signatures import Signature, parse

SCHEMA = "grpo/vendor-surface/2"
SURFACE, RULES = "vendor_surface.json", "vendor_rules.json"
"""Files beside a plugin's modules: made by `extract`, and written by hand from the vendor's documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op of one version."""

    signatures: tuple[Signature, ...]
    """Its overloads; none where it is known to exist and no more (a class made in C++, a constant)."""
    gradient: bool
    """Whether autograd has a formula for it."""
    is_class: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What the documentation asks beyond the signature."""

    explicit: tuple[str, ...] = ()
    """Arguments that must be given, because versions differ in their defaults."""
    values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Argument -> values that it may have, held against literals."""
    together: tuple[Mapping[str, Any], ...] = ()
    """{"when": {argument: value or null for any}, "why": ...} and what that asks of others: "given":
    [arguments], "without": [arguments], "values": {argument: values that it may have}."""
    forbidden: Mapping[str, str] = field(default_factory=dict)
    """Argument -> why it must not be given."""
    changed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Argument, or "" for the whole op -> {"at": version, "why": ...}: same name, another meaning."""
    harmless: frozenset[str] = frozenset()
    """Arguments whose defaults differ between versions in nothing that matters."""
    returns: bool = True
    """False for what gives nothing back, so that no gradient is lost in it."""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """A vendor's package as far as it is known."""

    distribution: str
    also: tuple[str, ...] = ()
    """Other distributions that come in the same versions and may be named in its place."""
    roots: tuple[str, ...]
    """Dotted names under which ops are called: "torch_npu", "torch.ops.npu"."""
    only: tuple[str, ...] = ()
    """Beginnings of the names, after the root, that are looked at ("cuda", "_grouped*"); none means all."""
    always: str = ""
    """Versions that every offer admits unless it says less: of a package that the core itself needs."""
    before: tuple[str, ...] = ()
    """Releases older than those here: an offer that admits one claims more than was looked at."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that some versions make up when they are imported, and where these have them."""
    python: bool = False
    """Read from Python's sources, so that names which are not called are known too."""
    undeclared: tuple[str, ...] = ("npu.", "_C.")
    """Beginnings of names that an offer need not list in `symbols`."""
    versions: tuple[str, ...]
    ops: Mapping[str, Mapping[str, Op]]
    """Version -> name after the root -> op."""
    rules: Mapping[str, Rule]

    def specifiers(self, requires: Sequence[str]) -> list[Requirement]:
        """The requirements that speak of this package."""
        names = {canonicalize_name(name) for name in (self.distribution, *self.also)}
        mine = [one for one in map(Requirement, requires) if canonicalize_name(one.name) in names]
        return [Requirement(f"{self.distribution}{self.always}"), *mine] if self.always else mine

    def admitted(self, requires: Sequence[str]) -> tuple[str, ...]:
        """The known versions that these requirements let in; none of them where they do not name it."""
        mine = self.specifiers(requires)
        if not mine:
            return ()
        return tuple(
            version
            for version in self.versions
            if all(one.specifier.contains(_bare(version), prereleases=True) for one in mine)
        )

    def too_old(self, requires: Sequence[str]) -> list[str]:
        """Releases that these requirements let in and that nobody looked at."""
        mine = self.specifiers(requires)
        return [
            version
            for version in self.before
            if mine and all(one.specifier.contains(version, prereleases=True) for one in mine)
        ]


def _bare(version: str) -> str:
    """ "2.6.3" of "2.6.3 (installed)"."""
    return version.partition(" ")[0]


def load(folder: Path) -> tuple[Surface, ...]:
    """The surfaces beside a plugin's modules, one a package of the vendor's.

    Raises `ConfigError` where there is none, or a broken one.
    """
    try:
        content = json.loads((folder / SURFACE).read_text(encoding="utf-8"))
        rules = json.loads((folder / RULES).read_text(encoding="utf-8"))["rules"]
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, this suite reads {SCHEMA!r}")
        return tuple(_surface(one, rules) for one in content["packages"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} has no surface of a vendor to audit against",
            why=f"{type(error).__name__}: {error}",
            fix=f"make {SURFACE} with `python -m grpo_conformance.audit.extract`, and write {RULES}",
        ) from error


def _surface(content: Mapping[str, Any], rules: Mapping[str, Any]) -> Surface:
    versions = tuple(sorted(content["archives"], key=Version))
    roots = tuple(content["roots"])
    mine: dict[str, Rule] = {}
    for name, row in rules.items():
        root = next((root for root in roots if name.startswith(root + ".")), None)
        mine |= {name[len(root) + 1 :]: _rule(row)} if root else {}
    return Surface(
        distribution=content["distribution"],
        also=tuple(content.get("also", ())),
        roots=roots,
        only=tuple(content.get("only", ())),
        always=content.get("always", ""),
        before=tuple(content.get("before", ())),
        aliases=content.get("aliases", {}),
        python=content.get("python", False),
        undeclared=tuple(content.get("undeclared", ("npu.", "_C."))),
        versions=versions,
        ops={version: _ops(content["ops"], version) for version in versions},
        rules=mine,
    )


def _ops(table: Mapping[str, Sequence[Mapping[str, Any]]], version: str) -> dict[str, Op]:
    return {
        name: Op(
            signatures=tuple(map(parse, row["signatures"])),
            gradient=row["gradient"],
            is_class=row.get("class", False),
        )
        for name, rows in table.items()
        for row in rows
        if version in row["versions"]
    }


def _rule(row: Mapping[str, Any]) -> Rule:
    return Rule(
        explicit=tuple(row.get("explicit", ())),
        values={name: tuple(allowed) for name, allowed in row.get("values", {}).items()},
        together=tuple(row.get("together", ())),
        forbidden=row.get("forbidden", {}),
        changed=row.get("changed", {}),
        harmless=frozenset(row.get("harmless", ())),
        returns=row.get("returns", True),
        source=row.get("source", ""),
    )
