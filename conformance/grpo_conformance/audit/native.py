"""Schemas of torch's own ops, and which autograd can go through, from the tables that its wheels carry."""

from __future__ import annotations

import re

from .sources import DATA, Sources

STUBS = ("torch._C", "torch._C._VariableFunctions", "torch._C._nn")
"""Modules in C++ whose stubs give the signatures of ops."""

_ENTRY = re.compile(r"^- func: (?P<name>\w+)(?P<rest>[.(].*)$", re.MULTILINE)
_FORMULA = re.compile(r"^- name: (?P<name>\w+)", re.MULTILINE)


class Native:
    """The table of one version of torch; empty for other packages."""

    def __init__(self, sources: Sources) -> None:
        self._table, formulas = (sources.data(name) or "" for name in DATA)
        self._formulas = {match["name"] for match in _FORMULA.finditer(formulas)}
        self._places: dict[str, list[re.Match[str]]] = {}
        for match in _ENTRY.finditer(self._table):
            self._places.setdefault(match["name"], []).append(match)

    def differentiable(self, name: str) -> bool | None:
        """Whether an op has a formula, or is made of ops that have; None for no op of this name."""
        places = self._places.get(name)
        if places is None:
            return None
        return name in self._formulas or any(self._composite(match) for match in places)

    def schemas(self, name: str) -> list[str]:
        """Schemas of an op's overloads, as `torch.ops.aten` takes them."""
        return [f"{match['name']}{match['rest']}" for match in self._places.get(name, ())]

    def _composite(self, match: re.Match[str]) -> bool:
        """Whether an op is made of others, so that autograd sees through it."""
        following = self._table.find("\n- func:", match.end())
        entry = self._table[match.end() : following if following > 0 else len(self._table)]
        return "CompositeImplicitAutograd" in entry or "\n  dispatch:" not in entry
