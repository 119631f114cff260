"""What the audit reads of a plugin's sources: calls into a vendor's package, and who calls whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = object()
"""A value that is no literal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one op."""

    op: str
    """Name after the root: "npu_rms_norm", "npu.set_device"; "Layer().forward" is a method of what "Layer"
    gives, and "Layer().__call__" a call of that."""
    module: str
    line: int
    positional: tuple[tuple[Any, ...], ...]
    """Possible values of each, `UNKNOWN` for what is no literal; starred ones left out."""
    keywords: Mapping[str, tuple[Any, ...]]
    starred: bool
    graded: bool
    """Whether autograd is on: false under `torch.no_grad()`."""
    guarded: bool = False
    """Whether `hasattr` was asked before, so that some versions may lack it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """A name of a vendor's that is imported, passed on or looked at, and not called there."""

    op: str
    """Name after the root."""
    module: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A name that a function uses, and so may call."""

    name: str
    method: bool
    """An attribute of an object that is not known: any method of that name."""
    graded: bool
    run: bool
    """Called, or looked into; a class that is neither is only told apart from others."""
    path: str = ""
    """Where it is in this package, if that is known."""


@dataclass(slots=True, kw_only=True)
class Scope:
    """A function, a method, a class or what is given to a name at the top level."""

    module: str
    name: str
    """Qualified within its module: "PagedLayer.read"."""
    calls: list[Call] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
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
