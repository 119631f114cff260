"""Python sources of a package: out of a wheel, a source archive or an installation; nothing is imported."""

from __future__ import annotations

import ast
import functools
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import Distribution
from pathlib import Path

from packaging.utils import parse_sdist_filename, parse_wheel_filename

DATA = ("torchgen/packaged/ATen/native/native_functions.yaml", "torchgen/packaged/autograd/derivatives.yaml")
"""Files that are no modules, and are read too: the tables of torch's own ops."""


class Sources:
    """Modules by their dotted names, each parsed when it is asked for; stubs stand for what is in C++."""

    def __init__(self, texts: Mapping[str, Callable[[], str]]) -> None:
        self._texts = dict(texts)
        self._trees: dict[str, ast.Module] = {}

    def __contains__(self, module: str) -> bool:
        return self._file(module) is not None

    def _file(self, module: str) -> str | None:
        path = module.replace(".", "/")
        tried = (f"{path}/__init__.py", f"{path}.py", f"{path}/__init__.pyi", f"{path}.pyi")
        return next((name for name in tried if name in self._texts), None)

    def is_package(self, module: str) -> bool:
        """Whether a module is a folder's `__init__`."""
        return "/__init__.py" in (self._file(module) or "")

    def has(self, package: str) -> bool:
        """Whether anything here belongs to a top-level package."""
        return any(name.startswith(f"{package}/") or name == f"{package}.py" for name in self._texts)

    def tree(self, module: str) -> ast.Module:
        """A module's syntax. Raises KeyError for one that is not here."""
        if module not in self._trees:
            name = self._file(module)
            if name is None:
                raise KeyError(module)
            self._trees[module] = ast.parse(self._texts[name]())
        return self._trees[module]

    def data(self, name: str) -> str | None:
        """Text of one of `DATA`, if it is there."""
        return self._texts[name]() if name in self._texts else None

    def __or__(self, other: Sources) -> Sources:
        """Both together, as for a package that comes in two distributions."""
        return Sources({**self._texts, **other._texts})


def read_archive(path: Path) -> Sources:
    """Sources of a wheel or of a source archive (.tar.gz)."""
    if path.suffix == ".whl":
        # ZipFile reads its directory once; members are read when they are wanted.
        wheel = zipfile.ZipFile(path)
        return Sources({
            name: functools.partial(_member, wheel, name) for name in wheel.namelist() if _wanted(name)
        })  # fmt: skip
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and _wanted(name) and (file := archive.extractfile(member)) is not None:
                texts[name] = functools.partial(str, file.read().decode("utf-8", "replace"))
    return Sources(texts)


def read_installed(distribution: Distribution) -> Sources:
    """Sources of what is installed, by the files that its metadata lists."""
    files: Iterable[object] = distribution.files or ()
    return Sources({
        str(name): functools.partial(_text, Path(str(distribution.locate_file(str(name)))))
        for name in files if _wanted(str(name))
    })  # fmt: skip


def version_of(path: Path) -> tuple[str, str]:
    """(distribution, version) by an archive's name. Raises ValueError for a name that is none."""
    read = parse_wheel_filename if path.suffix == ".whl" else parse_sdist_filename
    name, version = read(path.name)[:2]
    return name, str(version)


def _wanted(name: str) -> bool:
    return name.endswith((".py", ".pyi")) or name in DATA


def _member(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(name).decode("utf-8", "replace")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
