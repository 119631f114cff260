"""Comparing a callable or a class with the Protocol of its op."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from inspect import Parameter
from typing import Any

KIND_NAMES = {
    Parameter.POSITIONAL_ONLY: "positional-only",
    Parameter.POSITIONAL_OR_KEYWORD: "positional",
    Parameter.VAR_POSITIONAL: "*args",
    Parameter.KEYWORD_ONLY: "keyword-only",
    Parameter.VAR_KEYWORD: "**kwargs",
}


def mismatch(served: Any, protocol: type, kind: str, *, leave_out: Collection[str] = ()) -> str | None:
    """How `served` differs from `protocol` in parameter names and kinds, or None.

    A "function" is held against the Protocol's `__call__`, a "class" against each of its methods; a
    Protocol without `__init__` means a class that is constructed without arguments. Further parameters
    are allowed where they have a default. `leave_out` names parameters that an older offer lacks.
    """
    if kind == "function":
        if not callable(served):
            return f"{served!r} is not callable"
        return _compare(served, _parameters(vars(protocol)["__call__"]), "", leave_out)
    if not inspect.isclass(served):
        return f"{served!r} is not a class"
    return _class_mismatch(served, protocol)


def _class_mismatch(served: type, protocol: type) -> str | None:
    methods = protocol_methods(protocol)
    if "__init__" not in methods:
        needed = [p.name for p in _own(served) or [] if _required(p)]
        if needed:
            return f"its constructor asks for {', '.join(needed)}; it is constructed without arguments"
    for name, method in methods.items():
        found = served if name == "__init__" else getattr(served, name, None)
        if not callable(found) or (name == "__call__" and "__call__" not in _names(served)):
            return f"it has no method {name}"
        takes_self = name != "__init__" and inspect.isfunction(inspect.getattr_static(served, name))
        problem = _compare(found, _parameters(method), name, (), drop_first=takes_self)
        if problem:
            return problem
    return None


def _names(served: type) -> set[str]:
    # hasattr(served, "__call__") is true of every class: it finds the metaclass's.
    return {name for base in served.__mro__ for name in vars(base)}


def protocol_methods(protocol: type) -> dict[str, Any]:
    """The methods that a Protocol declares itself, in its order."""
    return {
        name: value
        for name, value in vars(protocol).items()
        if inspect.isfunction(value) and value.__module__ == protocol.__module__
    }


def _parameters(method: Any) -> list[Parameter]:
    """Of a Protocol's method, without `self`."""
    return list(inspect.signature(method).parameters.values())[1:]


def _own(served: Any) -> list[Parameter] | None:
    try:
        return list(inspect.signature(served).parameters.values())
    except (ValueError, TypeError):
        return None


def _compare(
    found: Any, wanted: list[Parameter], method: str, leave_out: Collection[str], *, drop_first: bool = False
) -> str | None:
    own = _own(found)
    place = f"{method}: " if method else ""
    if own is None:
        return f"{place}its signature cannot be read; wrap it in a Python function"
    own = own[1:] if drop_first else own
    wanted = [p for p in wanted if p.name not in leave_out]
    problem = _parameter_problem(own, wanted)
    if problem is None:
        return None
    return f"{place}{problem}; wanted {spell(wanted)}, found {spell(own)}"


def _parameter_problem(own: list[Parameter], wanted: list[Parameter]) -> str | None:
    positional = [p for p in wanted if p.kind is not Parameter.KEYWORD_ONLY]
    for index, parameter in enumerate(positional):
        if index >= len(own) or own[index].kind is Parameter.KEYWORD_ONLY:
            return f"positional parameter {index + 1} {parameter.name!r} is missing"
        if own[index].name != parameter.name:
            return f"positional parameter {index + 1} is {own[index].name!r}, not {parameter.name!r}"
    have = {p.name: p for p in own}
    for parameter in wanted:
        if parameter.name not in have:
            return f"parameter {parameter.name!r} is missing"
        kind = have[parameter.name].kind
        if kind is not parameter.kind:
            return f"{parameter.name!r} is {KIND_NAMES[kind]}, not {KIND_NAMES[parameter.kind]}"
    known = {p.name for p in wanted}
    extra = [p.name for p in own if p.name not in known and _required(p)]
    return f"it also asks for {', '.join(extra)}" if extra else None


def _required(parameter: Parameter) -> bool:
    variable = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not variable


def spell(parameters: list[Parameter]) -> str:
    """Names and kinds as Python writes them, without annotations."""
    bare = [p.replace(annotation=Parameter.empty) for p in parameters]
    try:
        return str(inspect.Signature(bare))
    except ValueError:
        return "(" + ", ".join(p.name for p in bare) + ")"
