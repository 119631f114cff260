"""Schemas of a dispatcher's ops out of the bytes of a wheel's libraries, where they are string literals."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .python import signature

_TEXT = re.compile(rb"(?<![\x20-\x7e])([A-Za-z_][\w:]*(?:\.\w+)?\([\x20-\x7e]*?\) *-> *[\x20-\x7e]+?)\x00")
_TYPES = re.compile(
    r"(\*|Tensor|int|float|bool|str|Scalar|SymInt|Device|Dtype|Layout|Generator|Storage|Dict|Any|t\b)"
)
_NODE = re.compile(rb"(?<![A-Za-z])([A-Z][A-Za-z0-9]{2,80}?)Backward\d+(?![A-Za-z0-9])")
"""Name of the class that autograd's generator makes for an op with a formula."""

Schemas = Mapping[str, tuple[list[str], bool]]


def schemas(blob: bytes) -> Iterable[str]:
    """Schemas among a library's string literals."""
    for match in _TEXT.finditer(blob):
        text = (
            match[1].decode().rpartition("::")[2] if b"::" in match[1].split(b"(")[0] else match[1].decode()
        )
        arguments = text[text.index("(") + 1 : text.rindex(") ->") if ") ->" in text else text.rindex(")")]
        # A message that happens to hold "(...) -> ..." does not begin with a type.
        if ") ->" in text and (not arguments or _TYPES.match(arguments)):
            yield text


def read_wheel(path: Path, compiled: Iterable[str] = ()) -> Schemas:
    """Name -> (its signatures, whether autograd has a formula), of ops and of Python functions under "npu".

    `compiled` are names under "_C", which have no signatures; they are there if a library holds each part.
    """
    texts: dict[str, list[str]] = {}
    nodes: set[str] = set()
    modules: dict[str, str] = {}
    unseen = {name: set(name.split(".")[1:]) for name in compiled}
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if name.endswith(".so"):
                blob = wheel.read(name)
                for text in schemas(blob):
                    texts.setdefault(text.split("(")[0].split(".")[0], []).append(text)
                nodes |= {match[1].decode().lower() for match in _NODE.finditer(blob)}
                for parts in unseen.values():
                    parts -= {part for part in parts if part.encode() + b"\0" in blob}
            elif name.endswith(".py") and name.count("/") == 2 and name.split("/")[1] == "npu":
                modules[Path(name).stem] = wheel.read(name).decode("utf-8")
    found: dict[str, tuple[list[str], bool]] = {
        name: ([text], False) for name, text in python_names(modules).items()
    }
    for name, parts in unseen.items():
        found |= {} if parts else {name: ([], False)}
    for name, several in texts.items():
        found[name] = (sorted(set(several)), name.replace("_", "").lower() in nodes)
    return found


def python_names(modules: Mapping[str, str]) -> dict[str, str]:
    """ "npu.memory.empty_cache" and "npu.empty_cache" -> "def empty_cache(): ...", as the package exports."""
    own = {stem: dict(python_functions(text)) for stem, text in modules.items()}
    found = {
        f"npu.{stem}.{name}": text
        for stem, functions in own.items()
        for name, text in functions.items()
        if stem != "__init__"
    }
    for node in ast.parse(modules.get("__init__", "")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module in own:
            functions = own[node.module]
            for alias in node.names:
                names = functions if alias.name == "*" else {alias.name: ""}
                found |= {f"npu.{name}": functions[name] for name in names if name in functions}
    return found | {f"npu.{name}": text for name, text in own.get("__init__", {}).items()}


def python_functions(text: str) -> Iterable[tuple[str, str]]:
    """(name, "def name(...): ...") of a module's functions and of its classes' constructors."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, signature(node)
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and child.name in ("__init__", "__new__"):
                    yield node.name, signature(child, owner=node, name=node.name)
