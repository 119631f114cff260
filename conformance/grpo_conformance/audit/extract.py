"""Make a plugin's `vendor_surface.json` from wheels: schemas out of the bytes of their libraries, no import.

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 torch-npu==2.13.0
    python -m grpo_conformance.audit.extract plugins/ascend/grpo_ascend torch_npu-*.whl

The ops of the file that is there and those that the plugin's sources call are looked up in each wheel. Take
wheels for aarch64: compilers for x86-64 fold short string literals into instructions, where nothing finds
them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import parse_wheel_filename
from packaging.version import Version

from .calls import read_package
from .surface import SCHEMA, SURFACE

_TEXT = re.compile(rb"(?<![\x20-\x7e])([A-Za-z_][\w:]*(?:\.\w+)?\([\x20-\x7e]*?\) *-> *[\x20-\x7e]+?)\x00")
_TYPES = re.compile(
    r"(\*|Tensor|int|float|bool|str|Scalar|SymInt|Device|Dtype|Layout|Generator|Storage|Dict|Any|t\b)"
)
_NODE = re.compile(rb"(?<![A-Za-z])([A-Z][A-Za-z0-9]{2,80}?)Backward\d+(?![A-Za-z0-9])")
"""Name of the class that autograd's generator makes for an op with a formula."""

Found = Mapping[str, tuple[list[str], bool]]


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


def read_wheel(path: Path, compiled: Iterable[str] = ()) -> Found:
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
            yield node.name, _signature(node.name, node.args)
        elif isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef) and child.name in ("__init__", "__new__"):
                    child.args.args = child.args.args[1:]
                    yield node.name, _signature(node.name, child.args)


def _signature(name: str, arguments: ast.arguments) -> str:
    for group in (arguments.posonlyargs, arguments.args, arguments.kwonlyargs):
        for argument in group:
            argument.annotation = None
    return f"def {name}({ast.unparse(arguments)}): ..."


def surface(
    wheels: Sequence[Path], wanted: Iterable[str], distribution: str, roots: Sequence[str]
) -> dict[str, Any]:
    """The content of the file, for the wanted ops; equal signatures of several versions are one row."""
    read = {}
    wanted = sorted(set(wanted))
    compiled = [op for op in wanted if op.startswith("_C.")]
    for path in wheels:
        name, its_version, _, _ = parse_wheel_filename(path.name)
        version = str(its_version)
        assert name == distribution, f"{path.name} is no wheel of {distribution}"
        read[version] = (path, read_wheel(path, compiled))
    ops: dict[str, list[dict[str, Any]]] = {}
    for op in wanted:
        for version, (_, found) in read.items():
            if op not in found:
                continue
            texts, gradient = found[op]
            rows = ops.setdefault(op, [])
            same = [row for row in rows if (row["signatures"], row["gradient"]) == (texts, gradient)]
            if same:
                same[0]["versions"].append(version)
            else:
                rows.append({"versions": [version], "signatures": texts, "gradient": gradient})
    for rows in ops.values():
        for row in rows:
            row["versions"].sort(key=Version)
    return {
        "schema": SCHEMA,
        "distribution": distribution,
        "roots": list(roots),
        "made by": "python -m grpo_conformance.audit.extract, from the wheels below, as PyPI has them",
        "wheels": {
            version: {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for version, (path, _) in sorted(read.items(), key=lambda item: Version(item[0]))
        },
        "ops": ops,
    }


def main(words: Sequence[str]) -> int:
    """Write the file again; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the plugin's package")
    parser.add_argument("wheels", type=Path, nargs="+", help="wheels of the vendor, one a version")
    parser.add_argument("--op", action="append", default=[], help="one more op to keep")
    parser.add_argument("--distribution", default="torch-npu")
    parser.add_argument("--root", action="append", default=[], help="default: torch_npu, torch.ops.npu")
    args = parser.parse_args(words)
    roots = args.root or ["torch_npu", "torch.ops.npu"]
    target = args.package / SURFACE
    before = json.loads(target.read_text(encoding="utf-8"))["ops"] if target.exists() else {}
    modules = read_package(args.package, roots)
    called = {call.op for module in modules.values() for scope in module.scopes.values()
              for call in scope.calls}  # fmt: skip
    content = surface(args.wheels, [*before, *args.op, *called], args.distribution, roots)
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    absent = sorted(called - content["ops"].keys())
    print(f"{target}: {len(content['ops'])} ops of {len(content['wheels'])} versions")
    print(
        f"called, but in none of them: {', '.join(absent)}" if absent else "every op that is called is there"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
