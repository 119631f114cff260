"""What a dotted path names in a package's sources, followed through imports and assignments."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .names import absolute, dotted, statements
from .sources import Sources

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
FUNCTION = ("torch.autograd.Function", "torch.autograd.function.Function", "autograd.Function", "Function")
"""What classes that bring their own backward pass derive from."""
INHERITED = frozenset({
    "add_param_group", "apply", "buffers", "children", "cpu", "cuda", "double", "eval", "float", "half",
    "load_state_dict", "modules", "named_buffers", "named_modules", "named_parameters", "param_groups",
    "parameters", "register_buffer", "register_parameter", "requires_grad_", "state", "state_dict", "step",
    "to", "train", "zero_grad",
})  # fmt: skip
"""Methods of torch's modules and optimizers, whose sources lie in another package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """Where a path ends."""

    module: str
    """Of the definition; of the last import, for what lies outside."""
    node: Node | None = None
    """None for a module, for a value, and for what lies outside."""
    owner: ast.ClassDef | None = None
    """Class of a method."""
    outside: str = ""
    """Path of what another package brings."""
    apply: bool = False
    """`apply` of a class for autograd, whose `forward` is the node."""


class Definitions:
    """Definitions in one version of a package."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._bound: dict[str, dict[str, list[Node | ast.expr | str]]] = {}
        self._stars: dict[str, list[str]] = {}
        self._busy: set[str] = set()

    def find(self, path: str) -> list[Definition]:
        """Definitions of a path, several where sources choose between them; none where there is none."""
        if path in self._busy:
            return []
        self._busy.add(path)
        try:
            return self._find(path)
        finally:
            self._busy.discard(path)

    def _find(self, path: str) -> list[Definition]:
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            module = ".".join(parts[:end])
            if module in self.sources:
                rest = parts[end:]
                if rest:
                    return self.inside(module, rest)
                return self._over_module(module) or [Definition(module=module)]
        return [] if self.sources.has(parts[0]) else [Definition(module="", outside=path)]

    def _over_module(self, module: str) -> list[Definition]:
        """What a package's `__init__` binds to the name of one of its modules, which then is no module."""
        package, _, name = module.rpartition(".")
        if not package or not self.sources.is_package(package) or name not in self._bindings(package):
            return []
        return self.inside(package, [name])

    def inside(self, module: str, names: Sequence[str]) -> list[Definition]:
        """Definitions of a chain of names as a module sees it."""
        found: list[Definition] = []
        bound = self._bindings(module)
        for one in bound.get(names[0], ()):
            if isinstance(one, str):
                found += self.find(".".join([one, *names[1:]]))
            elif isinstance(one, Node):
                found += self._member(Definition(module=module, node=one), names[1:])
            else:
                found += self._value(module, one, names[1:])
        if names[0] not in bound:
            for star in self._stars[module]:
                if star in self.sources and (there := self.find(".".join([star, *names]))):
                    return there
        return found

    def imports(self, module: str, name: str) -> list[str]:
        """Paths that a module imports under a name."""
        return [one for one in self._bindings(module).get(name, ()) if isinstance(one, str)]

    def is_compiled(self, path: str) -> bool:
        """Whether a path is a module of this package that has no source here."""
        package = path.rpartition(".")[0]
        return self.sources.is_package(package) and path not in self.sources and not self.find(path)

    def _bindings(self, module: str) -> dict[str, list[Node | ast.expr | str]]:
        """Name -> definitions, values and paths that a module's top level gives it."""
        if module in self._bound:
            return self._bound[module]
        bound = self._bound[module] = {}
        stars = self._stars[module] = []
        is_package = self.sources.is_package(module)
        for node in statements(self.sources.tree(module).body):
            if isinstance(node, Node):
                known = bound.setdefault(node.name, [])
                if not _is_overload(node):
                    # The real one replaces its overloads, which stubs alone leave without one.
                    known[:] = [one for one in known if not (isinstance(one, Node) and _is_overload(one))]
                known.append(node)
            elif isinstance(node, ast.ImportFrom):
                source = absolute(node, module, is_package)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (path := f"{source}.{alias.name}") != f"{module}.{alias.asname or alias.name}":
                        bound.setdefault(alias.asname or alias.name, []).append(path)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name.partition(".")[0]
                    bound.setdefault(name, []).append(alias.name if alias.asname else name)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        bound.setdefault(target.id, []).append(node.value)
        return bound

    def _value(self, module: str, value: ast.expr, rest: Sequence[str]) -> list[Definition]:
        """What a module-level value stands for: another name, or a wrapped function."""
        if isinstance(value, ast.Call) and value.args and _last(value.func) != "partial":
            # f = compile(g), f = add_docstring(g, "...").
            value = value.args[0]
        chain = dotted(value)
        if chain:
            return self.inside(module, [*chain, *rest]) or [Definition(module=module)]
        return [] if rest else [Definition(module=module)]

    def _member(self, found: Definition, rest: Sequence[str]) -> list[Definition]:
        if not rest:
            return [found]
        if not isinstance(found.node, ast.ClassDef) or len(rest) > 1:
            return []
        return self.method(found.module, found.node, rest[0])

    def method(self, module: str, owner: ast.ClassDef, name: str) -> list[Definition]:
        """A method of a class, its own or inherited."""
        if name == "apply" and self.is_function(module, owner):
            return [
                Definition(module=one.module, node=one.node, owner=one.owner, apply=True)
                for one in self.method(module, owner, "forward")
            ]
        own = [child for child in owner.body if isinstance(child, Node) and child.name == name]
        if own:
            return [Definition(module=module, node=own[-1], owner=owner)]
        if name in _fields(owner):
            return [Definition(module=module)]
        for base in self.bases(module, owner):
            if base.outside:
                if name in INHERITED:
                    return [base]
            elif isinstance(base.node, ast.ClassDef) and (there := self.method(base.module, base.node, name)):
                return there
        return []

    def bases(self, module: str, owner: ast.ClassDef) -> Iterator[Definition]:
        """What a class derives from."""
        for base in owner.bases:
            chain = dotted(base.value if isinstance(base, ast.Subscript) else base)
            if chain:
                yield from self.inside(module, chain) or [Definition(module=module, outside=".".join(chain))]

    def is_function(self, module: str, owner: ast.ClassDef) -> bool:
        """Whether a class brings its own backward pass to autograd."""
        return any(
            base.outside in FUNCTION
            or (isinstance(base.node, ast.ClassDef) and base.node is not owner
                and self.is_function(base.module, base.node))
            for base in self.bases(module, owner)
        )  # fmt: skip


def _fields(owner: ast.ClassDef) -> set[str]:
    """Values that a class gives names to."""
    targets: list[ast.expr] = []
    for child in owner.body:
        targets += child.targets if isinstance(child, ast.Assign) else []
        targets += [child.target] if isinstance(child, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_overload(node: Node) -> bool:
    return any(_last(one) == "overload" for one in node.decorator_list)


def _last(node: ast.expr) -> str:
    chain = dotted(node.func if isinstance(node, ast.Call) else node)
    return chain[-1] if chain else ""
