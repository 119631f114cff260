"""What a name in a plugin's sources may mean: "flash_attn.flash_attn_func", read without importing anything.

A meaning is a dotted path. "a.Layer()" is what calling "a.Layer" gives, so that "a.Layer().forward" is a
method of an instance; "a.run~" is "a.run" with some arguments given already. A name that is bound several
times has several meanings; one whose values say nothing has none. Followed are imports wherever they stand,
assignments, attributes of `self`, annotations of arguments and fields, and what functions of the package
return.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef
NOTHING: frozenset[str] = frozenset()
PARTIAL = ("functools.partial", "partial")
SAME = (
    "torch.compile",
    "torch.compiler.disable",
    "torch.no_grad()",
    "functools.cache",
    "functools.lru_cache",
)
"""What returns its first argument, for all that matters here."""


@dataclass(slots=True, kw_only=True)
class Env:
    """Names of one function, class or module, looked up outwards."""

    parent: Env | None = None
    bound: dict[str, list[ast.expr | str | None]] = field(default_factory=dict)
    """Name -> expressions that it is given, or paths; None for a value that nothing is known of."""


class Names:
    """The names of one module, given those of its package."""

    def __init__(
        self, name: str, tree: ast.Module, package: dict[str, Names], is_package: bool = False
    ) -> None:
        self.name, self.package, self.is_package = name, package, is_package
        package[name] = self
        self.functions: dict[str, tuple[Function, Env]] = {}
        self.classes: dict[str, tuple[ast.ClassDef, dict[str, list[tuple[ast.expr, Env]]]]] = {}
        self.env = Env()
        self._busy: set[int] = set()
        self._inner: dict[int, Env] = {}
        self._define(tree.body, self.env, "", None)

    def within(self, node: Function | ast.Lambda, env: Env, owner: str = "") -> Env:
        """Names inside of a function that stands in `env`; `owner` is the class of a method."""
        if id(node) not in self._inner:
            inner = Env(parent=env)
            args = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            for arg in args:
                known = _annotated(arg.annotation)
                inner.bound[arg.arg] = [known] if known is not None else [None]
            if owner and args and args[0].arg in ("self", "cls"):
                inner.bound[args[0].arg] = [f"{self.name}.{owner}" + ("()" if args[0].arg == "self" else "")]
            if not isinstance(node, ast.Lambda):
                self._bind(node.body, inner, "")
            self._inner[id(node)] = inner
        return self._inner[id(node)]

    def meaning(self, node: ast.expr, env: Env) -> frozenset[str]:
        """Paths that an expression may stand for."""
        if id(node) in self._busy:
            return NOTHING
        self._busy.add(id(node))
        try:
            return self._meaning(node, env)
        finally:
            self._busy.discard(id(node))

    def _meaning(self, node: ast.expr, env: Env) -> frozenset[str]:
        if isinstance(node, ast.Name):
            return self._name(node.id, env)
        if isinstance(node, ast.Attribute):
            return _union(self._member(path, node.attr) for path in self.meaning(node.value, env))
        if isinstance(node, ast.IfExp):
            return self.meaning(node.body, env) | self.meaning(node.orelse, env)
        if isinstance(node, ast.BoolOp):
            return _union(self.meaning(value, env) for value in node.values)
        if isinstance(node, ast.NamedExpr | ast.Starred):
            return self.meaning(node.value, env)
        if isinstance(node, ast.Call):
            return _union(self._called(path, node, env) for path in self.meaning(node.func, env))
        return NOTHING

    def _name(self, name: str, env: Env | None) -> frozenset[str]:
        while env is not None:
            if name in env.bound:
                here = env
                return _union(
                    self._whole(one) if isinstance(one, str) else self.meaning(one, here)
                    for one in env.bound[name]
                    if one is not None
                )
            env = env.parent
        return frozenset({name})

    def _called(self, path: str, node: ast.Call, env: Env) -> frozenset[str]:
        """What a call gives."""
        first = node.args[0] if node.args else None
        if path == "importlib.import_module" or path == "__import__":
            module = _text(first)
            return frozenset({module}) if module else NOTHING
        if path == "getattr" and first is not None and (name := _text(*node.args[1:2])):
            return _union(self._member(one, name) for one in self.meaning(first, env))
        if path in PARTIAL or path in SAME:
            of = self.meaning(first, env) if first is not None else NOTHING
            return frozenset(f"{one.rstrip('~')}~" for one in of) if path in PARTIAL else of
        own = self._own(path)
        if own is None:
            return frozenset({f"{path.rstrip('~')}()"})
        names, inside = own
        if inside in names.functions:
            function, outer = names.functions[inside]
            return names.returned(function, names.within(function, outer, inside.rpartition(".")[0]))
        return frozenset({f"{path}()"})

    def returned(self, function: Function, env: Env) -> frozenset[str]:
        """What a function may return."""
        values = [node.value for node in statements(function.body) if isinstance(node, ast.Return)]
        return _union(self.meaning(value, env) for value in values if value is not None)

    def _own(self, path: str) -> tuple[Names, str] | None:
        """The module of the package that a path lies in, and the rest of the path."""
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            if (module := ".".join(parts[:end])) in self.package:
                return self.package[module], ".".join(parts[end:])
        return None

    def _whole(self, path: str) -> frozenset[str]:
        """A path as written, followed to where the package has it from."""
        own = self._own(path)
        if own is None or not own[1] or "()" in path:
            return frozenset({path})
        names, inside = own
        head, _, rest = inside.partition(".")
        if rest or inside in names.functions or inside in names.classes or head not in names.env.bound:
            return frozenset({path})
        bound = [one for one in names.env.bound[head] if one != path]
        return _union(
            self._whole(one) if isinstance(one, str) else names.meaning(one, names.env)
            for one in bound
            if one is not None
        )

    def _member(self, path: str, name: str) -> frozenset[str]:
        """An attribute of what a path stands for."""
        if path.endswith("~"):
            return NOTHING
        own = self._own(path.removesuffix("()"))
        if own is None:
            return frozenset({f"{path}.{name}"})
        names, inside = own
        if inside in names.classes:
            return names._attribute(inside, name)
        return self._whole(f"{path}.{name}")

    def _attribute(self, owner: str, name: str) -> frozenset[str]:
        node, fields = self.classes[owner]
        if f"{owner}.{name}" in self.functions:
            return frozenset({f"{self.name}.{owner}.{name}"})
        if name in fields:
            return _union(self.meaning(value, env) for value, env in fields[name])
        bases = _union(self.meaning(base, self.env) for base in node.bases)
        return _union(self._member(f"{base}()", name) for base in bases if base != f"{self.name}.{owner}")

    def _define(self, body: Iterable[ast.stmt], env: Env, prefix: str, owner: str | None) -> None:
        """Enter functions and classes of a module or class, then its other names."""
        for node in statements(body):
            if isinstance(node, Function):
                self.functions[prefix + node.name] = (node, env)
            elif isinstance(node, ast.ClassDef):
                name = prefix + node.name
                fields: dict[str, list[tuple[ast.expr, Env]]] = {}
                self.classes[name] = (node, fields)
                inner = Env(parent=env)
                self._define(node.body, inner, f"{name}.", name)
                # A method does not see the names of its class.
                for child in node.body:
                    if isinstance(child, Function):
                        self.functions[f"{name}.{child.name}"] = (child, env)
                self._fields(node, name, env, fields)
        self._bind(body, env, prefix)

    def _fields(
        self, node: ast.ClassDef, name: str, env: Env, fields: dict[str, list[tuple[ast.expr, Env]]]
    ) -> None:
        for child in node.body:
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                if (known := _annotated(child.annotation)) is not None:
                    fields.setdefault(child.target.id, []).append((known, env))
            elif isinstance(child, ast.Assign):
                for target in child.targets:
                    if isinstance(target, ast.Name):
                        fields.setdefault(target.id, []).append((child.value, env))
            elif isinstance(child, Function):
                inner = self.within(child, env, name)
                for target, value in _assigned(child.body):
                    if value is not None and _is_own(target):
                        assert isinstance(target, ast.Attribute)
                        fields.setdefault(target.attr, []).append((value, inner))

    def _bind(self, body: Iterable[ast.stmt], env: Env, prefix: str) -> None:
        def add(name: str, value: ast.expr | str | None) -> None:
            env.bound.setdefault(name, []).append(value)

        for target, given in _assigned(body):
            if isinstance(target, ast.Name):
                add(target.id, given)
        for node in statements(body):
            if isinstance(node, Function | ast.ClassDef):
                top = env is self.env or prefix
                add(node.name, f"{self.name}.{prefix}{node.name}" if top else None)
            elif isinstance(node, ast.ImportFrom):
                source = absolute(node, self.name, self.is_package)
                for alias in node.names:
                    add(alias.asname or alias.name, f"{source}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    add(alias.asname or alias.name.split(".")[0],
                        alias.name if alias.asname else alias.name.split(".")[0])  # fmt: skip


def absolute(node: ast.ImportFrom, importer: str, is_package: bool = False) -> str:
    """The module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, node.module] if node.module else base)


def statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block and of the blocks in it; functions and classes are one statement each."""
    for node in body:
        yield node
        if not isinstance(node, Function | ast.ClassDef):
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, ()))
            for part in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                yield from statements(part.body)


def _assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """(target, value) of everything that binds a name or an attribute; None for a value out of reach."""
    for node in statements(body):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                yield from _paired(target, node.value)
        elif isinstance(node, ast.AnnAssign):
            yield node.target, node.value or _annotated(node.annotation)
        elif isinstance(node, ast.AugAssign):
            yield node.target, None
        elif isinstance(node, ast.For | ast.AsyncFor):
            yield from _paired(node.target, None)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                if item.optional_vars is not None:
                    yield from _paired(item.optional_vars, item.context_expr)
        for inside in _expressions(node):
            if isinstance(inside, ast.NamedExpr):
                yield inside.target, inside.value
            elif isinstance(inside, ast.comprehension):
                yield from _paired(inside.target, None)


def _expressions(node: ast.stmt) -> Iterator[ast.AST]:
    """What stands within a statement, without the statements in it."""
    left: list[ast.AST] = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]
    while left:
        one = left.pop()
        yield one
        left += [child for child in ast.iter_child_nodes(one) if not isinstance(child, ast.stmt)]


def _paired(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    if isinstance(target, ast.Tuple | ast.List):
        values: list[Any] = [None] * len(target.elts)
        if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
            values = list(value.elts)
        for one, its in zip(target.elts, values, strict=True):
            yield from _paired(one, its)
    else:
        yield target, value


def _annotated(node: ast.expr | None) -> ast.expr | None:
    """An expression for a value of the annotated type: a call of its class."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            node = ast.parse(node.value, mode="eval").body
        except SyntaxError:
            return None
    if isinstance(node, ast.BinOp):
        node = node.left
    if isinstance(node, ast.Name | ast.Attribute):
        return ast.copy_location(ast.Call(func=node, args=[], keywords=[]), node)
    return None


def _is_own(node: ast.expr) -> bool:
    """Whether this is `self.name`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _text(node: ast.expr | None = None) -> str | None:
    """The text of a literal, None for anything else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def under(path: str, roots: Mapping[str, tuple[str, ...]] | Iterable[str]) -> str | None:
    """The path after the longest root that it lies under."""
    found = [root for root in roots if path.startswith(root + ".")]
    return path[len(max(found, key=len)) + 1 :] if found else None


def dotted(node: ast.expr) -> list[str]:
    """["torch_npu", "npu", "synchronize"], or nothing for what is no chain of names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []
