"""`grpo new-plugin KIND NAME [--out DIR]`: write a package that installs, is found, and passes its tests."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from types import MappingProxyType

from ..errors import ConfigError
from ..plugins import load
from .plugin_names import check_device, check_family, check_plugin, fields_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of plugin that can be written."""

    help: str
    what: str
    """The package in a few words."""
    files: Mapping[str, str]
    """Path in the new package -> its template in `grpo_core/templates`; all three hold `$fields`."""


COMMON: Mapping[str, str] = MappingProxyType(
    {
        "pyproject.toml": "common/pyproject.toml.tmpl",
        ".gitignore": "common/gitignore.tmpl",
        "$package/__init__.py": "common/init.py.tmpl",
    }
)
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "model": Kind(
            help="a model family",
            what="The $name model family",
            files={
                **COMMON,
                "README.md": "model/README.md.tmpl",
                ".github/workflows/ci.yml": "model/ci.yml.tmpl",
                "$package/plugin.py": "model/plugin.py.tmpl",
                "$package/$module.py": "model/family.py.tmpl",
                "tests/test_$module.py": "model/test_family.py.tmpl",
            },
        ),
        "device": Kind(
            help="a chip",
            what="The device $name",
            files={
                **COMMON,
                "README.md": "device/README.md.tmpl",
                "known-failures.toml": "device/known-failures.toml.tmpl",
                ".github/workflows/ci.yml": "device/ci.yml.tmpl",
                "$package/plugin.py": "device/plugin.py.tmpl",
                "$package/device.py": "device/device.py.tmpl",
                "$package/attention.py": "device/attention.py.tmpl",
                "tests/test_conformance.py": "device/test_conformance.py.tmpl",
            },
        ),
    }
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `grpo new-plugin`."""
    kinds = "; ".join(f"{name}: {kind.help}" for name, kind in KINDS.items())
    parser.add_argument("kind", choices=tuple(KINDS), help=kinds)
    parser.add_argument("name", help="of the family or device, in lower case: my-llm")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: grpo-NAME)")
    parser.add_argument(
        "--architecture", metavar="CLASS",
        help="what `architectures` in config.json says (model; default: <Name>ForCausalLM)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the package; returns 0. Raises `ConfigError` for a name or folder that cannot be used."""
    if args.architecture and args.kind != "model":
        raise ConfigError(
            f"--architecture says nothing of a {args.kind}",
            why="it names the class of a model in its config.json",
            fix="leave it out",
        )
    fields = fields_of(args.name, args.architecture)
    catalogue = load()
    check_plugin(fields, catalogue)
    if args.kind == "model":
        check_family(fields, catalogue)
    else:
        check_device(args.name, catalogue)
    folder = args.out if args.out is not None else Path(fields["distribution"])
    paths = write_package(args.kind, folder, fields)
    print(f"wrote {folder}:")
    print("\n".join(f"  {path}" for path in paths))
    print(f"\nnext:\n  cd {folder}\n  pip install -e '.[test]'\n  pytest\n  grpo plugins")
    return 0


def write_package(kind: str, folder: Path, fields: Mapping[str, str]) -> list[str]:
    """Fill the templates into `folder`, which appears complete or not at all; returns the paths in it.

    Raises `ConfigError` where the folder exists or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise ConfigError(
            f"{folder} exists already",
            why="a new package is written into a folder of its own, and nothing is overwritten",
            fix="remove it, or name another folder with --out",
        )
    templates = resources.files("grpo_core") / "templates"
    fields = {**fields, "what": Template(KINDS[kind].what).substitute(fields)}
    part = folder.with_name(f".{folder.name}.part{os.getpid()}")
    paths = []
    try:
        for target, source in KINDS[kind].files.items():
            path = Template(target).substitute(fields)
            text = Template((templates / source).read_text(encoding="utf-8")).substitute(fields)
            (part / path).parent.mkdir(parents=True, exist_ok=True)
            (part / path).write_text(text, encoding="utf-8")
            paths.append(path)
        part.rename(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written",
            why=f"{error.strerror}: {folder.parent}",
            fix="name a folder that you may write with --out",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return paths
