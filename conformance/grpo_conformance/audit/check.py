"""The audit: every call of a plugin against every version of the vendor's package that it admits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_core.impl import Impl

from .calls import UNKNOWN, Call, read_package
from .reach import Reached, half_functions, reached
from .surface import Op, Rule, Surface


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong, or may be."""

    kind: str
    """"unknown op", "unknown keyword", "too many positionals", "missing argument", "given twice", "value",
    "not explicit", "goes together", "no gradient", "half a backward", "symbols", "versions"."""
    where: str
    """"module:line", or the offer."""
    what: str
    versions: tuple[str, ...] = ()

    def __str__(self) -> str:
        versions = f" in {', '.join(self.versions)}" if self.versions else ""
        return f"{self.where}: {self.kind}: {self.what}{versions}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The result for one plugin."""

    findings: tuple[Finding, ...]
    calls: int
    offers: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    """(op and name, ops of the vendor that it can reach, versions that it was held against)."""


def audit(folder: Path, offers: Sequence[Impl], surface: Surface) -> Audit:
    """Hold a plugin's package against a vendor's surface. Raises SyntaxError for sources that are none."""
    modules = read_package(folder, surface.roots)
    calls = [call for module in modules.values() for scope in module.scopes.values() for call in scope.calls]
    findings: list[Finding] = []
    admitted: dict[tuple[str, int, str], set[str]] = {}
    rows = []
    for impl in offers:
        versions = surface.admitted(impl.requires)
        found = reached(impl.load, modules)
        rows.append((f"{impl.op} {impl.name}", tuple(sorted({one.call.op for one in found})), versions))
        findings += _offer(impl, found, versions, surface)
        for one in found:
            admitted.setdefault(_place(one.call), set()).update(versions)
    everywhere = {version for _, _, versions in rows for version in versions} or set(surface.versions)
    for call in calls:
        # What no offer reaches, such as the device, must do with every version that any offer admits.
        findings += _call(call, admitted.get(_place(call), everywhere), surface)
    findings += [
        Finding(kind="half a backward", where=f"{scope.module}.{scope.name}", what=f"it has no {missing}")
        for scope, missing in half_functions(modules)
    ]
    return Audit(findings=tuple(findings), calls=len(calls), offers=tuple(rows))


def _place(call: Call) -> tuple[str, int, str]:
    return call.module, call.line, call.op


def _offer(
    impl: Impl, found: Sequence[Reached], versions: Sequence[str], surface: Surface
) -> Iterator[Finding]:
    where = f"offer {impl.op} {impl.name}"
    if found and not versions:
        what = f"its requires {list(impl.requires)} admit no known version of {surface.distribution}"
        yield Finding(kind="versions", where=where, what=what)
    called = {one.call.op for one in found if not one.call.op.startswith(("npu.", "_C."))}
    declared = {_bare(symbol, surface.roots) for symbol in impl.symbols}
    for op in sorted(called - declared):
        yield Finding(kind="symbols", where=where, what=f"{op} is called and not declared")
    for op in sorted(declared - called):
        yield Finding(kind="symbols", where=where, what=f"{op} is declared and not called")
    if impl.backward:
        for one in found:
            if one.graded:
                yield from _gradient(impl, one.call, versions, surface)


def _bare(symbol: str, roots: Sequence[str]) -> str:
    """The name after the root."""
    return next((symbol[len(root) + 1 :] for root in roots if symbol.startswith(root + ".")), symbol)


def _gradient(impl: Impl, call: Call, versions: Sequence[str], surface: Surface) -> Iterator[Finding]:
    lacking = [
        version for version in versions if (op := surface.ops[version].get(call.op)) and not op.gradient
    ]
    if lacking:
        yield Finding(
            kind="no gradient", where=f"{call.module}:{call.line}", versions=tuple(lacking),
            what=f"{call.op} has no formula of autograd and no autograd.Function around it, and {impl.op} "
            f"{impl.name} offers a backward pass",
        )  # fmt: skip


def _call(call: Call, versions: Iterable[str], surface: Surface) -> Iterator[Finding]:
    """What is wrong with one call, equal findings of several versions as one."""
    found: dict[tuple[str, str], list[str]] = {}
    for version in (one for one in surface.versions if one in set(versions)):
        op = surface.ops[version].get(call.op)
        problems = [("unknown op", call.op)] if op is None else list(_misfit(call, op))
        for problem in problems:
            found.setdefault(problem, []).append(version)
    where = f"{call.module}:{call.line}"
    for (kind, what), bad in found.items():
        yield Finding(kind=kind, where=where, what=_named(what, call), versions=tuple(bad))
    rule = surface.rules.get(call.op)
    if rule is not None:
        for kind, what in _against(call, rule, _arguments(call, surface)):
            yield Finding(kind=kind, where=where, what=_named(what, call))


def _named(what: str, call: Call) -> str:
    return what if what.startswith(call.op) else f"{call.op}: {what}"


def _misfit(call: Call, op: Op) -> Iterable[tuple[str, str]]:
    """The problems with the overload that fits best."""
    if not op.signatures:
        return ()
    # `out=` belongs to the overload of that name, which the schemas list beside the others.
    tried = [
        signature.problems(len(call.positional), list(call.keywords), starred=call.starred)
        for signature in op.signatures
    ]
    return min(tried, key=len)


def _arguments(call: Call, surface: Surface) -> Mapping[str, tuple[object, ...]]:
    """Possible values of every argument by its name, positional ones named by the newest schema."""
    signatures = next(
        (surface.ops[version][call.op].signatures for version in reversed(surface.versions)
         if call.op in surface.ops[version]), (),
    )  # fmt: skip
    names = signatures[0].positional if signatures else ()
    return {**dict(zip(names, call.positional, strict=False)), **call.keywords}


def _against(call: Call, rule: Rule, given: Mapping[str, tuple[object, ...]]) -> Iterator[tuple[str, str]]:
    source = f" ({rule.source})" if rule.source else ""
    for name in rule.explicit:
        if name not in given and not call.starred:
            yield "not explicit", f"{name} must be given: versions differ in its default{source}"
    for name, allowed in rule.values.items():
        wrong = [value for value in given.get(name, ()) if value is not UNKNOWN and value not in allowed]
        if wrong:
            yield "value", f"{name}={wrong[0]!r} is none of {list(allowed)}{source}"
    for row in rule.together:
        if all(_may_be(given.get(name), value) for name, value in row["when"].items()):
            missing = [name for name in row["given"] if given.get(name, (None,)) == (None,)]
            if missing and not call.starred:
                yield "goes together", f"{row['why']}: {', '.join(missing)} not given"


def _may_be(values: tuple[object, ...] | None, wanted: object) -> bool:
    """Whether an argument may have a value, or one of a list; None asks only whether it is given."""
    if values is None or values == (None,):
        return False
    if wanted is None:
        return True
    options = wanted if isinstance(wanted, list) else [wanted]
    return any(value in options for value in values if value is not UNKNOWN)
