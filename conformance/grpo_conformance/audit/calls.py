"""Calls into a vendor's package, and who calls whom, read from a plugin's sources without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNKNOWN = object()
"""A value that is no literal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one op."""

    op: str
    """Name after the root: "npu_rms_norm", "npu.set_device"."""
    module: str
    line: int
    positional: tuple[tuple[Any, ...], ...]
    """Possible values of each, `UNKNOWN` for what is no literal; starred ones left out."""
    keywords: Mapping[str, tuple[Any, ...]]
    starred: bool
    graded: bool
    """Whether autograd is on: false under `torch.no_grad()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A name that a function uses, and so may call."""

    name: str
    method: bool
    """An attribute of an object that is not known: any method of that name."""
    graded: bool
    run: bool
    """Called, or looked into; a class that is neither is only told apart from others."""


@dataclass(slots=True, kw_only=True)
class Scope:
    """A function, a method or a class."""

    module: str
    name: str
    """Qualified within its module: "PagedLayer.read"."""
    calls: list[Call] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    bases: tuple[str, ...] = ()
    """Of a class."""
    members: tuple[str, ...] = ()
    """Of a class: names of its methods."""
    is_class: bool = False


@dataclass(slots=True, kw_only=True)
class Module:
    """One source file."""

    name: str
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name here -> (module, name there), for names of the same package."""
    scopes: dict[str, Scope] = field(default_factory=dict)


def read_package(folder: Path, roots: Sequence[str]) -> dict[str, Module]:
    """Every module of a package by its dotted name."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = read_module(name, path.read_text(encoding="utf-8"), roots)
    return modules


def read_module(name: str, text: str, roots: Sequence[str]) -> Module:
    """One module from its text; its top level is the scope "". Raises SyntaxError."""
    tree = ast.parse(text)
    module = Module(name=name)
    package = name.split(".")[0]
    vendor = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, name)
            for alias in node.names:
                if source.split(".")[0] == package:
                    module.imported[alias.asname or alias.name] = (source, alias.name)
                elif source in roots:
                    vendor[alias.asname or alias.name] = f"{source}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                vendor |= {alias.asname: alias.name} if alias.asname and _under(alias.name, roots) else {}
    constants = _constants(tree)
    _Reader(module, roots, vendor, constants).read(tree)
    return module


def _absolute(node: ast.ImportFrom, importer: str) -> str:
    if not node.level:
        return node.module or ""
    base = importer.split(".")[: -node.level]
    return ".".join([*base, node.module] if node.module else base)


def _under(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Literals bound to names at the top level, once."""
    found: dict[str, Any] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        pairs: Iterator[tuple[ast.expr, ast.expr]] = (
            (target, node.value) for target in targets if isinstance(node, ast.Assign)
        )
        for target, value in pairs:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for one, its in zip(target.elts, value.elts, strict=False):
                    _bind(found, one, its)
            else:
                _bind(found, target, value)
    return found


def _bind(found: dict[str, Any], target: ast.expr, value: ast.expr) -> None:
    if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
        found[target.id] = value.value


def dotted(node: ast.expr) -> list[str]:
    """["torch_npu", "npu", "synchronize"], or nothing for what is no chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


class _Reader:
    """Walks a module, keeping the scope that it is in."""

    def __init__(
        self, module: Module, roots: Sequence[str], vendor: Mapping[str, str], constants: Mapping[str, Any]
    ) -> None:
        self.module, self.roots, self.vendor, self.constants = module, roots, vendor, constants
        self.scope = Scope(module=module.name, name="")
        self.graded = True

    def read(self, tree: ast.Module) -> None:
        self.module.scopes[""] = self.scope
        for node in tree.body:
            self._visit(node)

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._function(node)
        elif isinstance(node, ast.ClassDef):
            self._class(node)
        elif isinstance(node, ast.With):
            self._with(node)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Attribute):
            self._attribute(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            self._refer(node.id, method=False, run=False)
        else:
            for child in ast.iter_child_nodes(node):
                self._visit(child)

    def _inside(self, scope: Scope, nodes: Sequence[ast.AST], graded: bool) -> None:
        before = self.scope, self.graded
        self.module.scopes[scope.name] = scope
        self.scope, self.graded = scope, graded
        for node in nodes:
            self._visit(node)
        self.scope, self.graded = before

    def _qualified(self, name: str) -> str:
        return f"{self.scope.name}.{name}" if self.scope.name else name

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        quiet = any(_is_no_grad(decorator) for decorator in node.decorator_list)
        if self.scope.name and not self.scope.is_class:
            # A function within a function runs as part of it.
            for child in node.body:
                self._visit(child)
            return
        scope = Scope(module=self.module.name, name=self._qualified(node.name))
        self._inside(scope, node.body, not quiet)

    def _class(self, node: ast.ClassDef) -> None:
        methods = tuple(
            child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        # The base of `class A(B[C])` is B.
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        scope = Scope(
            module=self.module.name, name=self._qualified(node.name), is_class=True, members=methods,
            bases=tuple(".".join(dotted(base)) for base in bases),
        )  # fmt: skip
        self._inside(scope, node.body, True)

    def _with(self, node: ast.With) -> None:
        before = self.graded
        for item in node.items:
            self._visit(item.context_expr)
            self.graded = self.graded and not _is_no_grad(item.context_expr)
        for child in node.body:
            self._visit(child)
        self.graded = before

    def _attribute(self, node: ast.Attribute) -> None:
        chain = dotted(node)
        if self._op(chain) is not None:
            return
        self._refer(node.attr, method=True)
        if chain:
            self._refer(chain[0], method=False)
        else:
            self._visit(node.value)

    def _refer(self, name: str, *, method: bool, run: bool = True) -> None:
        self.scope.references.append(Reference(name=name, method=method, graded=self.graded, run=run))

    def _op(self, chain: Sequence[str]) -> str | None:
        """The op's name after the root, for a chain that starts at a root or at a name imported from one."""
        if not chain:
            return None
        path = ".".join([self.vendor.get(chain[0], chain[0]), *chain[1:]])
        for root in self.roots:
            if path.startswith(root + "."):
                return path[len(root) + 1 :]
        return None

    def _call(self, node: ast.Call) -> None:
        op = self._op(dotted(node.func))
        if op is None and isinstance(node.func, ast.Name):
            self._refer(node.func.id, method=False)
        elif op is None:
            self._visit(node.func)
        else:
            self.scope.calls.append(self._recorded(node, op))
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._visit(argument)

    def _recorded(self, node: ast.Call, op: str) -> Call:
        starred = any(isinstance(argument, ast.Starred) for argument in node.args)
        plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        return Call(
            op=op,
            module=self.module.name,
            line=node.lineno,
            positional=tuple(self._values(argument) for argument in plain),
            keywords={key.arg: self._values(key.value) for key in node.keywords if key.arg},
            starred=starred or any(key.arg is None for key in node.keywords),
            graded=self.graded,
        )

    def _values(self, node: ast.expr) -> tuple[Any, ...]:
        """What an expression may be; every branch of a conditional one counts."""
        if isinstance(node, ast.Constant):
            return (node.value,)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return (self.constants[node.id],)
        if isinstance(node, ast.IfExp):
            return (*self._values(node.body), *self._values(node.orelse))
        return (UNKNOWN,)


def _is_no_grad(node: ast.expr) -> bool:
    name = ".".join(dotted(node.func if isinstance(node, ast.Call) else node))
    return name in ("torch.no_grad", "no_grad", "torch.inference_mode", "inference_mode")
