"""What changed between two reports: two chips, or two releases of one plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .case import BROKEN

GROWN = 2.0
"""An error that grew by this factor is told although it still passes."""
ABSENT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One case whose outcome differs."""

    case: str
    old: str
    new: str
    note: str
    worse: bool


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Cases that changed, those that broke first."""
    before = {row["id"]: row for row in old["cases"]}
    after = {row["id"]: row for row in new["cases"]}
    changes = [
        change
        for case_id in [*before, *(case_id for case_id in after if case_id not in before)]
        if (change := _change(case_id, before.get(case_id), after.get(case_id))) is not None
    ]
    return sorted(changes, key=lambda change: not change.worse)


def _change(case_id: str, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Change | None:
    was, now = (ABSENT if row is None else str(row["status"]) for row in (old, new))
    if was != now:
        worse = now in BROKEN or (now == ABSENT and was == "pass")
        note = "" if new is None else str(new.get("message", ""))
        return Change(case=case_id, old=was, new=now, note=note[:120], worse=worse)
    if old is None or new is None:
        return None
    before, after = old.get("error"), new.get("error")
    if isinstance(before, float) and isinstance(after, float) and after > GROWN * before > 0:
        note = f"error {before:.3g} -> {after:.3g}"
        return Change(case=case_id, old=was, new=now, note=note, worse=False)
    return None
