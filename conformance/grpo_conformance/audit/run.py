"""`grpo conformance audit PLUGIN`: the audit of an installed plugin's package."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from grpo_core.catalogue import Catalogue
from grpo_core.cli.table import print_table
from grpo_core.errors import ConfigError

from .check import Audit, audit
from .surface import load


def audit_plugin(name: str, catalogue: Catalogue) -> Audit:
    """The audit of a plugin by its id. Raises `ConfigError` for one that is not installed or that ships no
    surface of a vendor."""
    folder = package_of(name, catalogue)
    impls = [offer.impl for rows in catalogue.offers.values() for offer in rows if offer.plugin == name]
    return audit(folder, impls, load(folder))


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
    return f"{len(versions)}: {versions[0]} to {versions[-1]}" if versions else "-"
