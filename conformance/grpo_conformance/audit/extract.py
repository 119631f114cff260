"""Make a plugin's `vendor_surface.json` from the vendor's archives; nothing of them is imported or built.

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 torch-npu==2.13.0
    python -m grpo_conformance.audit.extract plugins/ascend/grpo_ascend torch_npu-*.whl

Archives are wheels and source archives (.tar.gz), any number of packages and versions together; which package
one is of, its name says. The file must be there and name the packages: a new one is an entry with its
`distribution`, its `roots` and, for one in Python, `"python": true`; `aliases` says where names are
that a package makes up when it is imported. Names that the plugin's sources,
its rules and the file itself have are looked up in each archive, and versions are added to those in the file.
A name that is new to the file is looked up in the archives given: give all that are to know it.

Of torch_npu, whose ops live in C++, take wheels for aarch64: compilers for x86-64 fold short string literals
into instructions, where nothing finds them. Of torch, take any wheel: the Python in all of them is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import Version

from .calls import Module
from .libraries import read_wheel
from .names import under
from .python import NONE, look_up
from .read import parse_package, read_package
from .sources import read_archive, version_of
from .surface import RULES, SURFACE

Row = dict[str, Any]
Rows = dict[str, list[Row]]
"""Name -> rows of versions that are alike, as the file has them."""


def main(words: Sequence[str]) -> int:
    """Write the file again; returns 0, or 1 where a name that is called was found in no version."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the plugin's package")
    parser.add_argument("archives", type=Path, nargs="+", help="wheels and source archives of the vendor")
    parser.add_argument("--fresh", action="store_true", help="drop the versions and names in the file first")
    args = parser.parse_args(words)
    target = args.package / SURFACE
    content = json.loads(target.read_text(encoding="utf-8"))
    rules = json.loads((args.package / RULES).read_text(encoding="utf-8"))["rules"]
    by_version = sort(args.archives, content["packages"])
    lacking = 0
    parsed = parse_package(args.package)
    for package in content["packages"]:
        found = by_version[package["distribution"]]
        if args.fresh:
            package |= {"archives": {}, "ops": {}}
        wanted = names(read_package(parsed, package["roots"], package.get("only", ())))
        wanted |= {name for one in rules if (name := under(one, package["roots"])) is not None}
        extend(package, found, wanted)
        absent = sorted(
            name for name in wanted if name not in package["ops"] and _is_asked(name, package["ops"])
        )
        lacking += len(absent)
        print(f"{package['distribution']}: {len(package['ops'])} names, {len(package['archives'])} versions")
        print(
            f"  used, but in none of them: {', '.join(absent)}" if absent else "  all that is used is there"
        )
    target.write_text(spell(content), encoding="utf-8")
    return 1 if lacking else 0


def spell(content: Mapping[str, Any]) -> str:
    """The file's text: a line for each archive's version and for each row."""
    head = {key: value for key, value in content.items() if key != "packages"}
    packages = ",\n".join(f"  {_spell_package(one)}" for one in content["packages"])
    return f'{{{json.dumps(head)[1:-1]},\n "packages": [\n{packages}\n ]}}\n'


def _spell_package(package: Mapping[str, Any]) -> str:
    head = {key: value for key, value in package.items() if key not in ("archives", "ops")}
    archives = ",\n".join(
        f"    {json.dumps(key)}: {json.dumps(one)}" for key, one in package["archives"].items()
    )
    ops = ",\n".join(
        f"    {json.dumps(name)}: [\n     {body}]"
        for name, rows in package["ops"].items()
        for body in [",\n     ".join(map(json.dumps, rows))]
    )
    return f'{{{json.dumps(head)[1:-1]},\n   "archives": {{\n{archives}}},\n   "ops": {{\n{ops}}}}}'


def sort(archives: Iterable[Path], packages: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Path]]]:
    """Package -> version -> its archives. Raises SystemExit for one of none of the packages."""
    owner: dict[str, str] = {
        canonicalize_name(name): package["distribution"]
        for package in packages for name in (package["distribution"], *package.get("also", ()))
    }  # fmt: skip
    found: dict[str, dict[str, list[Path]]] = {package["distribution"]: {} for package in packages}
    for path in archives:
        name, version = version_of(path)
        if name not in owner:
            raise SystemExit(f"{path.name}: {SURFACE} names no package {name}")
        found[owner[name]].setdefault(version, []).append(path)
    return found


def names(modules: Mapping[str, Module]) -> set[str]:
    """What a plugin uses of a package, by names after the root; of a method, its class too."""
    wanted = set()
    for module in modules.values():
        for scope in module.scopes.values():
            used = [one.op for one in scope.calls] + [one.op for one in scope.mentions]
            for op in used:
                base, instance, method = op.partition("().")
                wanted.add(base.partition("()")[0])
                if instance and "()" not in base + method:
                    wanted.add(f"{base}.{'forward' if method == '__call__' else method}")
    return wanted


def extend(package: dict[str, Any], archives: Mapping[str, Sequence[Path]], wanted: Iterable[str]) -> None:
    """Add versions to a package's entry, or read them again."""
    table: Rows = package.setdefault("ops", {})
    held = package.setdefault("archives", {})
    looked_for = sorted({*table, *wanted})
    for version, paths in sorted(archives.items(), key=lambda item: Version(item[0])):
        for rows in table.values():
            for row in rows:
                row["versions"] = [one for one in row["versions"] if one != version]
        held[version] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}
        for name, row in read(package, paths, looked_for).items():
            _add(table.setdefault(name, []), version, row)
    package["archives"] = dict(sorted(held.items(), key=lambda item: Version(item[0])))
    kept = {name: [row for row in table[name] if row["versions"]] for name in sorted(table)}
    package["ops"] = {
        name: sorted(rows, key=lambda row: Version(row["versions"][0])) for name, rows in kept.items() if rows
    }


def read(package: Mapping[str, Any], paths: Sequence[Path], names: Sequence[str]) -> dict[str, Row]:
    """Name -> its row without versions, of one version."""
    if package.get("python"):
        sources = read_archive(paths[0])
        for path in paths[1:]:
            sources |= read_archive(path)
        found = look_up(sources, package["roots"], names, package.get("aliases", NONE))
        # A method that only some object of another class has is no name of this package.
        return {name: one.row() for name, one in found.items() if _is_kept(name, found)}
    compiled = [name for name in names if name.startswith("_C.")]
    return {
        name: {"signatures": texts, "gradient": gradient}
        for name, (texts, gradient) in read_wheel(paths[0], compiled).items() if name in set(names)
    }  # fmt: skip


def _is_asked(name: str, table: Rows) -> bool:
    """Whether a name must be there; a method of what a function gave is no name of the package."""
    base = table.get(name.rpartition(".")[0])
    return base is None or not base[0]["signatures"] or "class" in base[0]


def _is_kept(name: str, found: Mapping[str, Any]) -> bool:
    base = found.get(name.rpartition(".")[0])
    return base is None or base.is_class or not base.signatures


def _add(rows: list[dict[str, Any]], version: str, row: Mapping[str, Any]) -> None:
    """Into the row of versions that are alike, or a row of its own."""
    for old in rows:
        if {**old, "versions": None} == {**row, "versions": None}:
            old["versions"] = sorted([*old["versions"], version], key=Version)
            return
    rows.append({"versions": [version], **row})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
