"""Signatures of a package's functions and classes out of its Python sources, no import."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .definitions import Definition, Definitions
from .gradients import differentiable
from .names import dotted
from .native import STUBS, Native
from .sources import Sources

NONE: Mapping[str, str] = MappingProxyType({})
ATEN = "torch.ops.aten."


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is known of one name in one version."""

    signatures: tuple[str, ...]
    """None for a value, or where the signature lies outside."""
    gradient: bool
    is_class: bool = False

    def row(self) -> dict[str, Any]:
        """As the surface's file has it, without its versions."""
        kept: dict[str, Any] = {"signatures": list(self.signatures), "gradient": self.gradient}
        return kept | {"class": True} if self.is_class else kept


def look_up(
    sources: Sources, roots: Iterable[str], wanted: Iterable[str], aliases: Mapping[str, str] = NONE
) -> dict[str, Found]:
    """The wanted names, each after its root, as far as a version has them.

    `aliases` says where a name is that a package makes up when it is imported.
    """
    definitions, native = Definitions(sources), Native(sources)
    found = {}
    for name in wanted:
        tried = [f"{root}.{one}" for one in (name, aliases.get(name)) if one for root in roots]
        for path in tried:
            if (one := describe(path, definitions, native)) is not None:
                found[name] = one
                break
    return found


def describe(path: str, definitions: Definitions, native: Native) -> Found | None:
    """What a path is; None where there is no such thing."""
    places = definitions.find(path)
    if not places and path.count(".") == 1 and STUBS[1] in definitions.sources:
        places = definitions.find(f"{STUBS[1]}.{path.rpartition('.')[2]}")
    if not places and path.startswith(ATEN) and (schemas := native.schemas(name := path[len(ATEN) :])):
        return Found(signatures=tuple(schemas), gradient=bool(native.differentiable(name)))
    known = [_describe(one, definitions, native) for one in places]
    if not known:
        return None
    signatures = tuple(dict.fromkeys(text for one in known for text in one.signatures))
    return Found(
        signatures=signatures,
        gradient=any(one.gradient for one in known),
        is_class=any(one.is_class for one in known),
    )


def _describe(found: Definition, definitions: Definitions, native: Native) -> Found:
    node = found.node
    if node is None:
        return Found(signatures=(), gradient=True)
    if found.module.partition(".")[0] == "torch":
        # What torch has in Python it has for autograd; what it has in C++ its tables know.
        gradient = found.module not in STUBS or native.differentiable(node.name) is not False
    else:
        # What runs inside of a Triton kernel autograd never sees.
        gradient = not found.module.startswith("triton.language") and differentiable(found, definitions)
    if isinstance(node, ast.ClassDef):
        return Found(signatures=_construction(found, definitions), gradient=gradient, is_class=True)
    if any(dotted(one) and dotted(one)[-1] == "property" for one in node.decorator_list):
        return Found(signatures=(), gradient=gradient)
    return Found(signatures=(signature(node, owner=found.owner, apply=found.apply),), gradient=gradient)


def _construction(found: Definition, definitions: Definitions) -> tuple[str, ...]:
    """Signature of a class's constructor, its own, inherited or made of its fields."""
    node = found.node
    assert isinstance(node, ast.ClassDef)
    if any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        return (_of_fields(node),)
    for name in ("__init__", "__new__"):
        for method in definitions.method(found.module, node, name):
            if isinstance(method.node, ast.FunctionDef):
                return (signature(method.node, owner=node, name=node.name),)
    return ()


def _of_fields(node: ast.ClassDef) -> str:
    args = []
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            plain = isinstance(child.value, ast.Constant)
            text = ast.unparse(child.value) if plain and child.value is not None else "..."
            args.append(child.target.id if child.value is None else f"{child.target.id}={text}")
    return f"def {node.name}({', '.join(args)}): ..."


def signature(
    node: ast.FunctionDef | ast.AsyncFunctionDef, *, owner: ast.ClassDef | None = None, apply: bool = False,
    name: str = "",
) -> str:  # fmt: skip
    """ "def name(x, *, n=1): ...", without annotations; `apply` takes its arguments by position alone."""
    arguments = copy.deepcopy(node.args)
    static = any(dotted(one) == ["staticmethod"] for one in node.decorator_list)
    if owner is not None and (apply or not static or name):
        for group in (arguments.posonlyargs, arguments.args):
            if group:
                del group[0]
                break
    if apply:
        arguments.posonlyargs = [*arguments.posonlyargs, *arguments.args]
        arguments.args = []
    for one in (
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ):
        if one is not None:
            one.annotation = None
    return f"def {name or node.name}({ast.unparse(arguments)}): ..."
