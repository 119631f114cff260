"""What an offer runs: the vendor's ops that can be reached from its pointer, and if autograd sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .calls import Call, Module, Reference, Scope

FUNCTION = ("torch.autograd.Function", "autograd.Function", "Function")
BOTH = frozenset({"forward", "backward"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A call of an op, and whether a gradient must come through it."""

    call: Call
    graded: bool


def reached(pointer: str, modules: Mapping[str, Module]) -> list[Reached]:
    """The vendor's calls behind "package.module:attribute"; none where it lies outside of these modules.

    A name stands for what it names in its module, a method of an unknown object for every method of that
    name in the modules in sight. A class that is passed on, and neither called nor looked into, is not run.
    """
    module, _, attribute = pointer.partition(":")
    start = _lookup(module, attribute, modules)
    seen: set[tuple[str, str, bool]] = set()
    found: dict[tuple[str, int, str], Reached] = {}
    left = [(scope, True) for scope in start]
    while left:
        scope, graded = left.pop()
        if is_function(scope):
            graded = False
        key = (scope.module, scope.name, graded)
        if key in seen:
            continue
        seen.add(key)
        for call in scope.calls:
            at = (call.module, call.line, call.op)
            through = graded and call.graded
            if at not in found or through:
                found[at] = Reached(call=call, graded=through)
        left += [(following, graded) for following in _members(scope, modules)]
        for reference in scope.references:
            left += [
                (following, graded and reference.graded)
                for following in _meant(reference, modules[scope.module], modules)
            ]
    return sorted(found.values(), key=lambda one: (one.call.module, one.call.line))


def is_function(scope: Scope) -> bool:
    """Whether a class brings its own backward pass to autograd."""
    return scope.is_class and any(base in FUNCTION for base in scope.bases)


def half_functions(modules: Mapping[str, Module]) -> Iterator[tuple[Scope, str]]:
    """Classes for autograd without one of their two halves, and which one."""
    for module in modules.values():
        for scope in module.scopes.values():
            if is_function(scope):
                for missing in sorted(BOTH - set(scope.members)):
                    yield scope, missing


def _lookup(module: str, name: str, modules: Mapping[str, Module]) -> list[Scope]:
    """What a name means in a module: its own scope, or one that it imported."""
    here = modules.get(module)
    if here is None:
        return []
    if name in here.scopes and name:
        return [here.scopes[name]]
    if name in here.imported:
        return _lookup(*here.imported[name], modules)
    return []


def _members(scope: Scope, modules: Mapping[str, Module]) -> list[Scope]:
    """A class is all of its methods, and those of its bases."""
    if not scope.is_class:
        return []
    here = modules[scope.module]
    own = [here.scopes[f"{scope.name}.{name}"] for name in scope.members]
    return own + [found for base in scope.bases for found in _lookup(scope.module, base, modules)]


def _at(path: str, modules: Mapping[str, Module]) -> list[Scope]:
    """The scope at a path of the package."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (module := ".".join(parts[:end])) in modules:
            return _lookup(module, ".".join(parts[end:]), modules)
    return []


def _meant(reference: Reference, here: Module, modules: Mapping[str, Module]) -> Iterable[Scope]:
    if reference.path:
        return _at(reference.path, modules)
    if not reference.method:
        named = _lookup(here.name, reference.name, modules)
        return [scope for scope in named if reference.run or not scope.is_class]
    near = {here.name, *(source for source, _ in here.imported.values())}
    return [
        scope
        for name in sorted(near & modules.keys())
        for scope in modules[name].scopes.values()
        if scope.name.endswith(f".{reference.name}") and not scope.is_class
    ]
