"""What the suite knows of one op: the sizes it varies, the shapes it names, the questions it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .question import Question

NONE: Mapping[str, Any] = {}
FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One op's cases as data. Shapes say which facts they change; those that an offer refuses fall out."""

    axes: Mapping[str, Sequence[Any]]
    """Fact -> values to try for the usual sizes, the preferred one first."""
    shapes: Mapping[str, Mapping[str, Any]]
    """Name of a shape -> facts that differ from the usual ones."""
    quick: Sequence[str]
    """Shapes of a quick run."""
    questions: Callable[[str, str, Mapping[str, Any], str], Iterable[Question]] | None
    """(op, name of the shape, facts, dtype) -> what is asked; None where `check` does it all."""
    check: str = ""
    """"module:function" that asks in its own way, such as the life cycle of a cache."""
    ends: Mapping[str, tuple[Sequence[str], tuple[int, int]]] = field(default_factory=dict)
    """What is named "least ..." and "most ...": the facts, set equal, and the span where none is declared."""
    trained: Sequence[str] = ()
    """Shapes that only an offer with a backward pass is asked."""
    since: Mapping[str, int] = field(default_factory=dict)
    """Shape -> contract version that added what it asks; offers of older ones are not asked."""
    partner: str = ""
    """Op whose offer of the same id is asked together with this one, as (partner, offer)."""
    dtypes: Sequence[str] = FLOATS
    dtype_fact: str = "dtype"
    """Fact that the dtype of a case stands in."""
