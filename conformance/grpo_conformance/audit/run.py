"""`grpo conformance audit PLUGIN`: the audit of an installed plugin's package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from grpo_core.catalogue import Catalogue
from grpo_core.cli.table import print_table
from grpo_core.errors import ConfigError

from .check import Audit, audit
from .python import look_up
from .signatures import parse
from .sources import Sources, read_installed
from .surface import Op, Surface, load

INSTALLED = "(installed)"


def audit_plugin(name: str, catalogue: Catalogue) -> Audit:
    """The audit of a plugin by its id, against the versions on file and against what is installed here.

    Raises `ConfigError` for a plugin that is not installed or that ships no surface of a vendor.
    """
    folder = package_of(name, catalogue)
    impls = [offer.impl for rows in catalogue.offers.values() for offer in rows if offer.plugin == name]
    return audit(folder, impls, [with_installed(surface) for surface in load(folder)])


def with_installed(surface: Surface) -> Surface:
    """A surface and, of a package in Python, what of it is installed; its sources are read, not imported."""
    if not surface.python:
        return surface
    sources, version = Sources({}), ""
    for name in (*surface.also, surface.distribution):
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        sources, version = sources | read_installed(distribution), distribution.version
    if not version:
        return surface
    label = f"{version} {INSTALLED}"
    wanted = {name for ops in surface.ops.values() for name in ops}
    found = look_up(sources, surface.roots, wanted, surface.aliases)
    ops = {
        name: Op(signatures=tuple(map(parse, one.signatures)), gradient=one.gradient, is_class=one.is_class)
        for name, one in found.items()
    }
    versions = sorted(
        [*surface.versions, label], key=lambda one: (Version(one.partition(" ")[0]), " " in one)
    )
    return replace(surface, versions=tuple(versions), ops={**surface.ops, label: ops})


def package_of(name: str, catalogue: Catalogue) -> Path:
    """Folder of the package that holds a plugin's module, found without importing its code."""
    for plugin in catalogue.plugins:
        if plugin.id == name:
            spec = importlib.util.find_spec(plugin.module.partition(":")[0].split(".")[0])
            if spec is not None and spec.submodule_search_locations:
                return Path(next(iter(spec.submodule_search_locations)))
    known = [plugin.id for plugin in catalogue.plugins]
    raise ConfigError(
        f"there is no plugin {name!r} with a package to audit",
        why=f"installed: {', '.join(known)}",
        fix="give one of these, from a package of its own",
    )


def report(name: str, result: Audit) -> None:
    """Print what was looked at and what was found."""
    rows = [[offer, _spell(ops), _span(versions)] for offer, ops, versions in result.offers]
    print_table(["offer", "calls", "versions"], rows)
    print(f"\n{name}: {result.calls} calls, {len(result.findings)} findings")
    for finding in result.findings:
        print(f"  {finding}")


def _spell(ops: Iterable[str]) -> str:
    return ", ".join(ops) or "-"


def _span(versions: tuple[str, ...]) -> str:
    here = f", {INSTALLED[1:-1]}" if any(INSTALLED in one for one in versions) else ""
    plain = [one for one in versions if INSTALLED not in one]
    return f"{len(plain)}: {plain[0]} to {plain[-1]}{here}" if plain else "-"
