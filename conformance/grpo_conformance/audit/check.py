"""The audit: every call of a plugin against every version of the vendor's packages that it admits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_core.impl import Impl

from .calls import Call, Module
from .fit import op_of, problems
from .names import under
from .reach import Reached, half_functions, reached
from .read import parse_package, read_package
from .surface import Rule, Surface


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is wrong, or may be."""

    kind: str
    """"unknown op", "unknown keyword", "positional only", "too many positionals", "missing argument", "given
    twice", "position", "default", "value", "not explicit", "goes together", "forbidden", "meaning", "no
    gradient", "half a backward", "symbols", "versions", "rule"."""
    where: str
    """"module:line", or the offer."""
    what: str
    versions: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = self.versions if len(self.versions) < 5 else (self.versions[0], "...", self.versions[-1])
        versions = f" in {', '.join(shown)}" if shown else ""
        return f"{self.where}: {self.kind}: {self.what}{versions}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The result for one plugin."""

    findings: tuple[Finding, ...]
    calls: int
    offers: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]
    """(op and name, what of one package it can reach, versions of that package that it was held against); one
    row for each package, and one at least."""


def audit(folder: Path, offers: Sequence[Impl], surfaces: Sequence[Surface]) -> Audit:
    """Hold a plugin's package against a vendor's surfaces. Raises SyntaxError for sources that are none."""
    findings: dict[Finding, None] = {}
    rows: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {_title(impl): [] for impl in offers}
    number = 0
    parsed = parse_package(folder)
    for surface in surfaces:
        modules = read_package(parsed, surface.roots, surface.only)
        calls = [
            call for module in modules.values() for scope in module.scopes.values() for call in scope.calls
        ]
        number += len(calls)
        admitted: dict[tuple[str, int, str], set[str]] = {}
        for impl in offers:
            versions = surface.admitted(impl.requires)
            found = reached(impl.load, modules)
            for one in found:
                admitted.setdefault(_place(one.call), set()).update(versions)
            findings |= dict.fromkeys(_offer(impl, found, versions, surface))
            if found or len(surfaces) == 1:
                ops = sorted({f"{surface.roots[0]}.{_declared(one.call)}" for one in found})
                rows[_title(impl)].append((tuple(ops), versions))
        findings |= dict.fromkeys(_package(modules, calls, admitted, offers, surface))
        findings |= dict.fromkeys(_rules(surface))
    findings |= dict.fromkeys(_strangers(offers, surfaces))
    table = [(title, ops, versions) for title, of in rows.items() for ops, versions in of or [((), ())]]
    return Audit(findings=tuple(findings), calls=number, offers=tuple(table))


def _title(impl: Impl) -> str:
    return f"{impl.op} {impl.name}"


def _place(call: Call) -> tuple[str, int, str]:
    return call.module, call.line, call.op


def _declared(call: Call) -> str:
    """What an offer lists for a call: the class, where it is one of an instance."""
    return call.op.partition("()")[0]


def _package(
    modules: Mapping[str, Module], calls: Sequence[Call], admitted: Mapping[tuple[str, int, str], set[str]],
    offers: Sequence[Impl], surface: Surface,
) -> Iterator[Finding]:  # fmt: skip
    """Every call and every name, whether or not an offer reaches it."""
    # What no offer reaches, such as the device, must do with every version that any offer admits.
    any_of_them = {version for impl in offers for version in surface.admitted(impl.requires)}
    everywhere = any_of_them or set(surface.versions)
    for call in calls:
        yield from _call(call, admitted.get(_place(call), everywhere), surface)
    if surface.python:
        for module in modules.values():
            for scope in module.scopes.values():
                for mention in scope.mentions:
                    yield from _missing(mention.op, f"{mention.module}:{mention.line}", everywhere, surface)
    for scope, missing in half_functions(modules):
        yield Finding(
            kind="half a backward", where=f"{scope.module}.{scope.name}", what=f"it has no {missing}"
        )


def _rules(surface: Surface) -> Iterator[Finding]:
    """Rules that can never speak: of an op or an argument that no version has."""
    for name, rule in surface.rules.items():
        known = [ops[name] for ops in surface.ops.values() if name in ops]
        signatures = [one for op in known for one in op.signatures]
        arguments = {name for one in signatures for name in (*one.positional, *one.keywords)}
        told = {*rule.explicit, *rule.values, *rule.forbidden, *rule.changed, *rule.harmless}
        told |= {one for row in rule.together for one in (*row["when"], *row.get("given", ()),
                 *row.get("without", ()), *row.get("values", ()))}  # fmt: skip
        if any(one.more_keywords for one in signatures):
            told = set()
        for what in [name] if not known else sorted(told - arguments - {""}):
            where = f"rule {surface.roots[0]}.{name}"
            yield Finding(kind="rule", where=where, what=f"no version of {surface.distribution} has {what}")


def _missing(op: str, where: str, versions: Iterable[str], surface: Surface) -> Iterator[Finding]:
    """A name that no version has; one that only some lack is judged where it is called."""
    if not any(op in surface.ops[version] for version in versions):
        yield Finding(kind="unknown op", where=where, what=f"{surface.roots[0]}.{op}")


def _offer(
    impl: Impl, found: Sequence[Reached], versions: Sequence[str], surface: Surface
) -> Iterator[Finding]:
    where = f"offer {_title(impl)}"
    if found and not versions:
        what = f"its requires {list(impl.requires)} admit no known version of {surface.distribution}"
        yield Finding(kind="versions", where=where, what=what)
    if found and (old := surface.too_old(impl.requires)):
        what = f"its requires admit {surface.distribution} {old[0]}, which nobody looked at"
        yield Finding(kind="versions", where=where, what=what)
    called = {_declared(one.call) for one in found}
    declared = {op for symbol in impl.symbols if (op := under(symbol, surface.roots)) is not None
                and _is_of(op, surface)}  # fmt: skip
    for op in sorted(called - declared):
        if not op.startswith(surface.undeclared):
            yield Finding(kind="symbols", where=where, what=f"{op} is called and not declared")
    for op in sorted(declared - called):
        yield Finding(kind="symbols", where=where, what=f"{op} is declared and not called")
    if impl.backward:
        for one in found:
            if one.graded:
                yield from _gradient(impl, one.call, versions, surface)


def _is_of(op: str, surface: Surface) -> bool:
    """Whether a name under a root is one that this surface looks at."""
    starts = tuple(one.rstrip("*") for one in surface.only)
    return not starts or op.startswith(starts)


def _strangers(offers: Sequence[Impl], surfaces: Sequence[Surface]) -> Iterator[Finding]:
    for impl in offers:
        for symbol in impl.symbols:
            if all((op := under(symbol, one.roots)) is None or not _is_of(op, one) for one in surfaces):
                what = f"{symbol} is of no package with a surface"
                yield Finding(kind="symbols", where=f"offer {_title(impl)}", what=what)


def _gradient(impl: Impl, call: Call, versions: Sequence[str], surface: Surface) -> Iterator[Finding]:
    lacking = []
    for version in versions:
        name, known = op_of(call, surface.ops[version])
        op = surface.ops[version].get(name) if known else None
        if op is not None and not op.gradient and surface.rules.get(name, Rule()).returns:
            lacking.append(version)
    if lacking:
        yield Finding(
            kind="no gradient", where=f"{call.module}:{call.line}", versions=tuple(lacking),
            what=f"{call.op} has no formula of autograd and no autograd.Function around it, and {impl.op} "
            f"{impl.name} offers a backward pass",
        )  # fmt: skip


def _call(call: Call, versions: Iterable[str], surface: Surface) -> Iterator[Finding]:
    """What is wrong with one call, equal findings of several versions as one."""
    wanted = set(versions)
    held = [version for version in surface.versions if version in wanted]
    for (kind, what), bad in problems(call, held, surface):
        text = what if what.startswith(call.op.partition("()")[0]) else f"{call.op}: {what}"
        yield Finding(kind=kind, where=f"{call.module}:{call.line}", what=text, versions=tuple(bad))
