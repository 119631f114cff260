"""A vendor's file of known failures: which cases may fail, why, and until when."""

from __future__ import annotations

import datetime
import fnmatch
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_core.errors import ConfigError

STALE = ("passes", "no case")
"""States of entries that no failure needs: left behind, or misspelt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One entry: a pattern of case ids ("ops/attention.*/mychip:*/bfloat16/*") with its reason."""

    case: str
    reason: str
    issue: str = ""
    """Where the failure is tracked."""
    until: datetime.date | None = None
    """The entry counts no more from this day on."""

    def matches(self, case_id: str) -> bool:
        """Whether the pattern is about this case."""
        return fnmatch.fnmatchcase(case_id, self.case)


def read_known(path: Path, *, today: datetime.date) -> tuple[Known, ...]:
    """Entries of a TOML file of `[[known]]` tables that have not expired.

    Raises `ConfigError` for a file that cannot be read, a key that does not exist, a missing reason.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _bad(path, str(error)) from error
    rows = content.get("known", [])
    if set(content) - {"known"} or not isinstance(rows, list):
        raise _bad(path, "it holds something else than [[known]] tables")
    entries = [_entry(path, index, row) for index, row in enumerate(rows)]
    return tuple(entry for entry in entries if entry.until is None or today < entry.until)


def told(
    entries: Sequence[Known], statuses: Mapping[str, str], everything: Iterable[str]
) -> list[dict[str, Any]]:
    """What became of each entry, for the report. Those in a state of `STALE` are errors.

    `statuses` are those of the cases that were run, `everything` the ids of all that the whole suite has.
    States: "used", some of its cases failed as it says; "passes", all of them were run and none failed; "no
    case", it is about none; "not asked", some were left out, and of the others none failed.
    """
    ids = sorted({*everything, *statuses})
    rows = []
    for entry in entries:
        about = [case_id for case_id in ids if entry.matches(case_id)]
        failed = sum(statuses.get(case_id) == "known" for case_id in about)
        state = "used" if failed else "passes" if about else "no case"
        if state == "passes" and any(case_id not in statuses for case_id in about):
            state = "not asked"
        rows.append({"case": entry.case, "reason": entry.reason, "issue": entry.issue, "state": state,
                     "cases": len(about), "failed": failed})  # fmt: skip
    return rows


def advice(row: Mapping[str, Any]) -> str:
    """What to do about an entry that is an error."""
    if row["state"] == "no case":
        return f"known failure {row['case']!r} is about no case: take it out or mend the pattern"
    return f"known failure {row['case']!r} is none: none of its {row['cases']} case(s) fails; take it out"


def _entry(path: Path, index: int, row: object) -> Known:
    where = f"entry {index + 1}"
    if not isinstance(row, dict):
        raise _bad(path, f"{where} is not a table")
    extra = sorted(row.keys() - {"case", "reason", "issue", "until"})
    if extra:
        raise _bad(path, f"{where} has the unknown key {extra[0]!r}")
    for key in ("case", "reason"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _bad(path, f"{where} has no {key}")
    until = row.get("until")
    if until is not None and type(until) is not datetime.date:
        raise _bad(path, f"{where}: until is not a date")
    return Known(case=row["case"], reason=row["reason"], issue=str(row.get("issue", "")), until=until)


def _bad(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is not a file of known failures",
        why=why,
        fix='write [[known]] tables with case = "pattern", reason = "...", and where wanted issue and until',
    )
