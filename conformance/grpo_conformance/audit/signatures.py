"""Signatures of a vendor's ops, as a dispatcher's schema writes them and as Python does."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_ARGUMENT = re.compile(r"(?P<type>\S.*?)\s+(?P<name>\w+)\s*(?:=(?P<default>.*))?$", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """One overload."""

    positional: tuple[str, ...]
    """Arguments that may be given by position, in their order."""
    keywords: tuple[str, ...] = ()
    """Arguments that may be given by keyword only."""
    unnamed: frozenset[str] = frozenset()
    """Those of `positional` that may not be given by keyword."""
    required: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Argument -> its value where it is a literal, else its text."""
    more_positional: bool = False
    more_keywords: bool = False

    def problems(self, count: int, given: Sequence[str], *, starred: bool) -> list[tuple[str, str]]:
        """(kind, text) of what is wrong with `count` positional arguments and these keywords.

        `starred` calls hide some of theirs, so that nothing is missing from them and nothing too much.
        """
        found = []
        known = {*self.positional, *self.keywords}
        unknown = [name for name in given if name not in known]
        if unknown:
            # What ends in **kwargs is seldom read there: a misspelt argument is lost without a word.
            lost = " is swallowed by **" if self.more_keywords else ""
            found.append(("unknown keyword", ", ".join(unknown) + lost))
        named = [name for name in given if name in self.unnamed]
        if named:
            found.append(("positional only", f"{', '.join(named)} cannot be given by keyword"))
        if count > len(self.positional) and not starred and not self.more_positional:
            found.append(("too many positionals", f"{count} given, {len(self.positional)} taken"))
        first = self.positional[:count]
        twice = [name for name in given if name in first and name not in self.unnamed]
        if twice:
            found.append(("given twice", ", ".join(twice)))
        missing = sorted(self.required - {*given, *first})
        if missing and not starred:
            found.append(("missing argument", ", ".join(missing)))
        return found


@functools.cache
def parse(text: str) -> Signature:
    """A schema `op(Tensor x, *, int n=1) -> Tensor`, or Python's `def name(x, *, n=1): ...`.

    Raises ValueError for anything else.
    """
    if text.startswith("def "):
        return _python(text)
    start, end = text.find("("), text.rfind(") ->")
    if start < 1 or end < start:
        raise ValueError(f"no schema: {text[:80]!r}")
    positional: list[str] = []
    keywords: list[str] = []
    defaults = {}
    into = positional
    for part in _split(text[start + 1 : end]):
        if part == "*":
            into = keywords
            continue
        match = _ARGUMENT.match(part)
        if match is None:
            raise ValueError(f"no argument of a schema: {part!r} in {text[:80]!r}")
        into.append(match["name"])
        if match["default"] is not None:
            defaults[match["name"]] = _literal(match["default"])
    required = frozenset({*positional, *keywords} - defaults.keys())
    # torch calls a schema's first argument "self" or "input"; the bindings take both.
    return Signature(
        positional=tuple(positional), keywords=tuple(keywords), required=required, defaults=defaults
    )


def _literal(text: str) -> Any:
    """A value, so that 1. and 1.0 are one default; text where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _split(text: str) -> list[str]:
    """The parts between commas that are neither in brackets nor in quotes."""
    parts, depth, quote, part = [], 0, "", ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
            continue
        part += letter
    return [*parts, part.strip()] if part.strip() else parts


def _python(text: str) -> Signature:
    try:
        (function,) = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"no Python signature: {text[:80]!r}") from error
    assert isinstance(function, ast.FunctionDef)
    args = function.args
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    without = len(positional) - len(args.defaults)
    given = dict(zip(positional[without:], args.defaults, strict=True))
    given |= {arg.arg: one for arg, one in zip(args.kwonlyargs, args.kw_defaults, strict=True) if one}
    keywords = tuple(arg.arg for arg in args.kwonlyargs)
    return Signature(
        positional=tuple(positional),
        keywords=keywords,
        unnamed=frozenset(arg.arg for arg in args.posonlyargs),
        required=frozenset({*positional, *keywords} - given.keys()),
        defaults={name: _literal(ast.unparse(value)) for name, value in given.items()},
        more_positional=args.vararg is not None,
        more_keywords=args.kwarg is not None,
    )
