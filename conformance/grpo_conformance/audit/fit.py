"""One call against the signatures of every version that may serve it, and against the rules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from packaging.version import Version

from .calls import UNKNOWN, Call
from .signatures import Signature
from .surface import Op, Rule, Surface

Problem = tuple[str, str]
"""(kind, text)."""


def op_of(call: Call, ops: Mapping[str, Op]) -> tuple[str, bool]:
    """Name of what is called, and whether the surface can tell; a method of what no class made cannot."""
    base, instance, method = call.op.partition("().")
    if not instance:
        return call.op, True
    known = ops.get(base)
    if known is None or not known.is_class or "()" in method:
        return call.op, False
    name = f"{base}.{'forward' if method == '__call__' and f'{base}.forward' in ops else method}"
    # A class whose methods nobody listed says nothing of them.
    return name, name in ops or any(other.startswith(f"{base}.") for other in ops)


def problems(call: Call, versions: Sequence[str], surface: Surface) -> Iterator[tuple[Problem, list[str]]]:
    """What is wrong with a call, each with the versions that it is wrong in; none listed where in all."""
    found: dict[Problem, list[str]] = {}
    fitting: dict[str, Signature] = {}
    name = call.op
    for version in versions:
        name, known = op_of(call, surface.ops[version])
        if not known:
            continue
        op = surface.ops[version].get(name)
        if op is None:
            if not call.guarded or not any(name in ops for ops in surface.ops.values()):
                found.setdefault(("unknown op", name), []).append(version)
            continue
        best = _best(call, op)
        if best is not None:
            fitting[version] = best
            for problem in _misfit(call, best):
                found.setdefault(problem, []).append(version)
    yield from found.items()
    rule = surface.rules.get(name, Rule())
    for problem in (*_moved(call, fitting), *_defaults(call, fitting, rule)):
        yield problem, []
    for problem in _against(call, rule, _arguments(call, fitting), versions):
        yield problem, []


def _misfit(call: Call, signature: Signature) -> Sequence[Problem]:
    return signature.problems(len(call.positional), list(call.keywords), starred=call.starred)


def _best(call: Call, op: Op) -> Signature | None:
    """The overload that fits best. `out=` belongs to one of its own, which schemas list beside the others."""
    return min(op.signatures, key=lambda one: len(_misfit(call, one)), default=None)


def _moved(call: Call, fitting: Mapping[str, Signature]) -> Iterator[Problem]:
    """Arguments by position that another version takes elsewhere. One that was renamed has not moved."""
    if call.starred or not fitting:
        return
    newest = list(fitting)[-1]
    now = fitting[newest].positional
    for at in range(min(len(call.positional), len(now))):
        for version, signature in fitting.items():
            then = signature.positional
            if at < len(then) and then[at] != now[at] and (then[at] in now or now[at] in then):
                yield "position", f"argument {at + 1} is {now[at]} in {newest} and {then[at]} in {version}"
                break


def _defaults(call: Call, fitting: Mapping[str, Signature], rule: Rule) -> Iterator[Problem]:
    """Arguments left out whose defaults are not the same in all versions."""
    if call.starred:
        return
    left: dict[str, list[tuple[object, str]]] = {}
    for version, signature in fitting.items():
        given = {*call.keywords, *signature.positional[: len(call.positional)]}
        for name, value in signature.defaults.items():
            values = left.setdefault(name, [])
            if name not in given and all(value != other for other, _ in values):
                values.append((value, version))
    for name, values in left.items():
        if len(values) > 1 and name not in rule.harmless:
            shown = ", ".join(f"{value!r} in {version}" for value, version in values)
            yield "default", f"{name} is left out and defaults to {shown}"


def _arguments(call: Call, fitting: Mapping[str, Signature]) -> Mapping[str, tuple[object, ...]]:
    """Possible values of every argument by its name, positional ones named by the newest signature."""
    names = fitting[list(fitting)[-1]].positional if fitting else ()
    return {**dict(zip(names, call.positional, strict=False)), **call.keywords}


def _against(
    call: Call, rule: Rule, given: Mapping[str, tuple[object, ...]], versions: Sequence[str]
) -> Iterator[Problem]:
    source = f" ({rule.source})" if rule.source else ""
    for name in rule.explicit:
        if name not in given and not call.starred:
            yield "not explicit", f"{name} must be given{source}"
    for name, allowed in rule.values.items():
        wrong = [value for value in given.get(name, ()) if value is not UNKNOWN and value not in allowed]
        if wrong:
            yield "value", f"{name}={wrong[0]!r} is none of {list(allowed)}{source}"
    for row in rule.together:
        if all(_may_be(given.get(name), value) for name, value in row["when"].items()):
            yield from _together(call, row, given)
    for name, why in rule.forbidden.items():
        if name in given:
            yield "forbidden", f"{name}: {why}{source}"
    for name, row in rule.changed.items():
        if (not name or name in given) and _both_sides(versions, row["at"]):
            yield "meaning", f"{name or 'it'} changed in {row['at']}: {row['why']}"


def _together(
    call: Call, row: Mapping[str, Any], given: Mapping[str, tuple[object, ...]]
) -> Iterator[Problem]:
    """What an argument asks of the others."""
    missing = [name for name in row.get("given", ()) if given.get(name, (None,)) == (None,)]
    if missing and not call.starred:
        yield "goes together", f"{row['why']}: {', '.join(missing)} not given"
    beside = [name for name in row.get("without", ()) if given.get(name, (None,)) != (None,)]
    if beside:
        yield "goes together", f"{row['why']}: {', '.join(beside)} given"
    for name, allowed in row.get("values", {}).items():
        wrong = [value for value in given.get(name, ()) if value is not UNKNOWN and value not in allowed]
        if wrong:
            yield "value", f"{row['why']}: {name}={wrong[0]!r} is none of {list(allowed)}"


def _both_sides(versions: Iterable[str], at: str) -> bool:
    older = [Version(version.partition(" ")[0]) < Version(at) for version in versions]
    return any(older) and not all(older)


def _may_be(values: tuple[object, ...] | None, wanted: object) -> bool:
    """Whether an argument may have a value, or one of a list; None asks only whether it is given."""
    if values is None or values == (None,):
        return False
    if wanted is None:
        return True
    options = wanted if isinstance(wanted, list) else [wanted]
    return any(value in options for value in values if value is not UNKNOWN)
