"""`grpo new-plugin model NAME [--out DIR]`: write a package that installs, is found, and passes its tests."""

from __future__ import annotations

import argparse
import keyword
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from string import Template
from types import MappingProxyType

from ..catalogue import Catalogue
from ..errors import ConfigError
from ..plugins import load

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
ARCHITECTURE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_NAME = 24
"""With more, lines of the package would be too long for its own linter."""
OWN = ("core", "conformance")
"""grpo_<name> is a package of this distribution; those of bundled plugins are found as plugins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of plugin that can be written."""

    help: str
    files: Mapping[str, str]
    """Path in the new package -> its template in `grpo_core/templates/<kind>`; both hold `$fields`."""


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "model": Kind(
            help="a model family",
            files={
                "pyproject.toml": "pyproject.toml.tmpl",
                "README.md": "README.md.tmpl",
                ".gitignore": "gitignore.tmpl",
                ".github/workflows/ci.yml": "ci.yml.tmpl",
                "$package/__init__.py": "init.py.tmpl",
                "$package/plugin.py": "plugin.py.tmpl",
                "$package/$module.py": "family.py.tmpl",
                "tests/test_$module.py": "test_family.py.tmpl",
            },
        )
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
    fields = fields_of(args.name, args.architecture)
    _check_free(fields, load())
    folder = args.out if args.out is not None else Path(fields["distribution"])
    paths = write_package(args.kind, folder, fields)
    print(f"wrote {folder}:")
    print("\n".join(f"  {path}" for path in paths))
    print(f"\nnext:\n  cd {folder}\n  pip install -e '.[test]'\n  pytest\n  grpo plugins")
    return 0


def fields_of(name: str, architecture: str | None = None) -> dict[str, str]:
    """What the templates are filled with. Raises `ConfigError` for a name that cannot be used."""
    _check_name(name)
    words = re.split("[-_]", name)
    cls = "".join(word[0].upper() + word[1:] for word in words)
    module = "_".join(words)
    # A module that is called like a keyword or like its neighbour plugin.py could not be imported.
    module += "_family" if keyword.iskeyword(module) or module == "plugin" else ""
    architecture = architecture or f"{cls}ForCausalLM"
    if not ARCHITECTURE.fullmatch(architecture):
        raise ConfigError(
            f"{architecture!r} cannot be an architecture",
            why="config.json names a class there, such as LlamaForCausalLM",
            fix="copy the entry of `architectures` in the model's config.json",
        )
    return {
        "name": name,
        "plugin": name,
        "module": module,
        "cls": f"{cls}Family" if keyword.iskeyword(cls) else cls,
        "architecture": architecture,
        "package": f"grpo_{'_'.join(words)}",
        "distribution": f"grpo-{'-'.join(words)}",
        "core_version": metadata.version("grpo-core"),
    }


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
    templates = resources.files("grpo_core") / "templates" / kind
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


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")[:MAX_NAME].strip("-")
        raise ConfigError(
            f"{name!r} cannot be a plugin's name",
            why=f"a name has lower-case letters, digits and single hyphens or underscores, starts with a "
            f"letter and has at most {MAX_NAME} characters; packages and modules are called after it",
            fix=f"take {near!r}" if near else "take a name such as my-llm",
        )
    if name in OWN:
        raise ConfigError(
            f"{name!r} cannot be a plugin's name",
            why=f"the package grpo_{name} belongs to grpo-core itself",
            fix="take another name",
        )


def _check_free(fields: Mapping[str, str], catalogue: Catalogue) -> None:
    """Two plugins of one name, or two for one architecture, would leave the new one unused."""
    for plugin in catalogue.plugins:
        if plugin.id == fields["plugin"]:
            raise ConfigError(
                f"a plugin {plugin.id!r} is installed already",
                why=f"it comes from {plugin.distribution} {plugin.version}, and names are unique",
                fix=f"take another name, or uninstall {plugin.distribution}",
            )
    for family in catalogue.models.values():
        if fields["architecture"] in family.architectures or family.name == fields["name"]:
            owner = catalogue.owners[f"model:{family.name}"]
            raise ConfigError(
                f"{fields['architecture']} is served already",
                why=f"by family {family.name!r} of plugin {owner!r}; of two the first is used",
                fix="take another name, or give the one of your config.json with --architecture",
            )
