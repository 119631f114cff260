"""Reads a plugin's sources, without importing them, into the records of `calls`."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .calls import UNKNOWN, Call, Mention, Module, Reference, Scope
from .names import PARTIAL, Env, Names, absolute, dotted, under

FUNCTIONAL = ("torch.func.functional_call", "torch.nn.utils.stateless.functional_call")
"""What calls its first argument, a module, with the third."""
QUIET = ("torch.no_grad", "no_grad", "torch.inference_mode", "inference_mode")


Parsed = Mapping[str, tuple[ast.Module, Names]]
"""Modules of a package by their dotted names."""


def parse_package(folder: Path) -> Parsed:
    """Every module of a package. Raises SyntaxError."""
    trees = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8")), is_package
    return _named(trees)


def read_package(parsed: Parsed, roots: Sequence[str], only: Sequence[str] = ()) -> dict[str, Module]:
    """What the modules of a package use of a vendor's.

    Args:
        roots: dotted names under which the vendor's ops are called.
        only: beginnings, after the root, of the names that are looked at; none of them means all.
    """
    modules = {}
    for name, (tree, names) in parsed.items():
        reader = _Reader(names, roots, only, _constants(tree))
        reader.read(tree)
        modules[name] = reader.module
    return modules


def read_module(name: str, text: str, roots: Sequence[str], only: Sequence[str] = ()) -> Module:
    """One module from its text; its top level is the scope "". Raises SyntaxError."""
    return read_package(_named({name: (ast.parse(text), False)}), roots, only)[name]


def _named(trees: Mapping[str, tuple[ast.Module, bool]]) -> Parsed:
    package: dict[str, Names] = {}
    return {
        name: (tree, Names(name, tree, package, is_package)) for name, (tree, is_package) in trees.items()
    }


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Literals bound to names at the top level, once."""
    found: dict[str, Any] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, its in zip(target.elts, node.value.elts, strict=False):
                    _bind(found, one, its)
            else:
                _bind(found, target, node.value)
    return found


def _bind(found: dict[str, Any], target: ast.expr, value: ast.expr) -> None:
    if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
        found[target.id] = value.value


class _Reader:
    """Walks a module, keeping the scope that it is in."""

    def __init__(
        self, names: Names, roots: Sequence[str], only: Sequence[str], constants: Mapping[str, Any]
    ) -> None:
        self.names, self.roots, self.only, self.constants = names, roots, only, constants
        self.module = Module(name=names.name)
        self.scope = Scope(module=names.name, name="")
        self.env = names.env
        self.graded = True
        self.guarded = False

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
        elif isinstance(node, ast.If | ast.IfExp) and _asks(node.test):
            before, self.guarded = self.guarded, True
            for child in ast.iter_child_nodes(node):
                self._visit(child)
            self.guarded = before
        elif isinstance(node, ast.ImportFrom):
            self._import(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not self.scope.name:
            self._value(node)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Attribute):
            self._attribute(node, called=False)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            self._mention(node)
            # Who is handed a function may call it where autograd is off.
            self._refer(node.id, method=False, run=False, graded=False)
        else:
            for child in ast.iter_child_nodes(node):
                self._visit(child)

    def _inside(self, scope: Scope, nodes: Sequence[ast.AST], env: Env, graded: bool) -> None:
        before = self.scope, self.env, self.graded
        self.module.scopes[scope.name] = scope
        self.scope, self.env, self.graded = scope, env, graded
        for node in nodes:
            self._visit(node)
        self.scope, self.env, self.graded = before

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        quiet = any(_is_no_grad(decorator) for decorator in node.decorator_list)
        owner = self.scope.name if self.scope.is_class else ""
        env = self.names.within(node, self.env, owner)
        if self.scope.name and not owner:
            # A function within a function runs as part of it.
            before, self.env = self.env, env
            for child in node.body:
                self._visit(child)
            self.env = before
            return
        name = f"{owner}.{node.name}" if owner else node.name
        self._inside(Scope(module=self.module.name, name=name), node.body, env, not quiet)

    def _class(self, node: ast.ClassDef) -> None:
        methods = tuple(
            child.name for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        # The base of `class A(B[C])` is B.
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        for base in bases:
            self._mention(base)
        scope = Scope(
            module=self.module.name, is_class=True, members=methods,
            name=f"{self.scope.name}.{node.name}" if self.scope.name else node.name,
            bases=tuple(".".join(dotted(base)) for base in bases),
        )  # fmt: skip
        self._inside(scope, node.body, self.env, True)

    def _with(self, node: ast.With) -> None:
        before = self.graded
        for item in node.items:
            self._visit(item.context_expr)
            self.graded = self.graded and not _is_no_grad(item.context_expr)
        for child in node.body:
            self._visit(child)
        self.graded = before

    def _value(self, node: ast.Assign | ast.AnnAssign) -> None:
        """What is given to a name at the top level: it runs where the name is used."""
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        scope = self.scope
        if isinstance(target, ast.Name) and target.id not in self.names.functions:
            name = target.id
            scope = self.module.scopes.setdefault(name, Scope(module=self.module.name, name=name))
        before, self.scope = self.scope, scope
        for child in ast.iter_child_nodes(node):
            self._visit(child)
        self.scope = before

    def _import(self, node: ast.ImportFrom) -> None:
        source = absolute(node, self.names.name, self.names.is_package)
        for alias in node.names:
            if source.split(".")[0] == self.names.name.split(".")[0]:
                self.module.imported[alias.asname or alias.name] = (source, alias.name)
            elif (op := self._under(f"{source}.{alias.name}")) is not None:
                self._note(op, node.lineno)

    def _attribute(self, node: ast.Attribute, *, called: bool) -> None:
        if self._mention(node):
            return
        self._refer(node.attr, method=True)
        for path in self._own(node):
            self._refer(node.attr, method=False, graded=called and self.graded, path=path)
        chain = dotted(node)
        if chain:
            self._refer(chain[0], method=False)
        else:
            self._visit(node.value)

    def _refer(
        self, name: str, *, method: bool, run: bool = True, graded: bool | None = None, path: str = ""
    ) -> None:
        through = self.graded if graded is None else graded
        here = Reference(name=name, method=method, graded=through, run=run, path=path)
        self.scope.references.append(here)

    def _own(self, node: ast.expr) -> list[str]:
        """What of this package an expression stands for."""
        start = self.names.name.partition(".")[0] + "."
        return [path for path in sorted(self.names.meaning(node, self.env)) if path.startswith(start)]

    def _under(self, path: str) -> str | None:
        """The op's name after the root, for a path to something that is looked at."""
        op = under(path, self.roots)
        if op is None or not self.only or any(f"{op}.".startswith(f"{one}.") for one in self.only):
            return op
        return op if any(one.endswith("*") and op.startswith(one[:-1]) for one in self.only) else None

    def _ops(self, node: ast.expr) -> list[str]:
        found = (self._under(path) for path in sorted(self.names.meaning(node, self.env)))
        return [op for op in found if op is not None]

    def _mention(self, node: ast.expr) -> bool:
        """Take down what of the vendor's an expression names, and whether there was any."""
        found = self._ops(node)
        for op in found:
            if "()" not in op and "~" not in op:
                self._note(op, node.lineno)
        return bool(found) and not isinstance(node, ast.Name)

    def _note(self, op: str, line: int) -> None:
        self.scope.mentions.append(Mention(op=op, module=self.module.name, line=line))

    def _call(self, node: ast.Call) -> None:
        ops = self._ops(node.func)
        self.scope.calls += [self._recorded(node, op) for op in ops]
        if isinstance(node.func, ast.Name):
            self._refer(node.func.id, method=False)
            for path in self._own(node.func):
                self._refer(node.func.id, method=False, path=path)
        elif isinstance(node.func, ast.Attribute) and not ops:
            self._attribute(node.func, called=True)
        elif not ops:
            self._visit(node.func)
        elif not isinstance(base := _base(node.func), ast.Name):
            self._visit(base)
        for given, op, starred in self._handed_on(node):
            self.scope.calls.append(self._recorded(given, op, starred=starred))
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self._visit(argument)

    def _handed_on(self, node: ast.Call) -> Iterator[tuple[ast.Call, str, bool]]:
        """Calls that another function makes of its first argument: (call, op, whether some is to come)."""
        if not node.args:
            return
        through = self.names.meaning(node.func, self.env)
        rest, keywords = node.args[1:], node.keywords
        starred = bool(through & set(PARTIAL))
        if through & set(FUNCTIONAL) and len(node.args) > 2:
            given = node.args[2]
            starred = not isinstance(given, ast.Tuple)
            rest = given.elts if isinstance(given, ast.Tuple) else [given]
            keywords = []
        elif not starred:
            return
        call = ast.copy_location(ast.Call(func=node.args[0], args=rest, keywords=keywords), node)
        for op in self._ops(node.args[0]):
            yield call, op, starred

    def _recorded(self, node: ast.Call, op: str, starred: bool = False) -> Call:
        starred = starred or op.endswith("~") or any(isinstance(one, ast.Starred) for one in node.args)
        plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        op = op.rstrip("~")
        return Call(
            op=f"{op}.__call__" if op.endswith("()") else op,
            module=self.module.name,
            line=node.lineno,
            positional=tuple(self._values(argument) for argument in plain),
            keywords={key.arg: self._values(key.value) for key in node.keywords if key.arg},
            starred=starred or any(key.arg is None for key in node.keywords),
            graded=self.graded,
            guarded=self.guarded or _asks(node.func),
        )

    def _values(self, node: ast.expr) -> tuple[Any, ...]:
        """What an expression may be; every branch of a conditional one counts."""
        if isinstance(node, ast.Constant):
            return (node.value,)
        if isinstance(node, ast.Name) and node.id in self.constants:
            return (self.constants[node.id],)
        if isinstance(node, ast.IfExp):
            return (*self._values(node.body), *self._values(node.orelse))
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError):
            return (UNKNOWN,)
        return (list(value) if isinstance(value, tuple) else value,)


def _asks(node: ast.expr) -> bool:
    """Whether `hasattr` is asked in an expression."""
    return any(isinstance(one, ast.Name) and one.id == "hasattr" for one in ast.walk(node))


def _base(node: ast.expr) -> ast.expr:
    """What a chain of attributes begins at."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def _is_no_grad(node: ast.expr) -> bool:
    return ".".join(dotted(node.func if isinstance(node, ast.Call) else node)) in QUIET
