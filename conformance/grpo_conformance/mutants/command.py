"""`grpo conformance --mutants`: the score, as a table and as JSON."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grpo_core.cli.table import print_table
from grpo_core.errors import ConfigError
from grpo_core.plugin_checks import did_you_mean

from ..report import MUTANTS as SCHEMA
from ..report import write
from ..sign import digest, sign
from .mutant import Mutant
from .run import HEALTHY_LEVELS, Alarm, Row, false_alarms, hunt
from .table import MUTANTS

WIDTH = 60


def run(names: Sequence[str], *, draws: int, out: Path | None, key: Path | None = None) -> int:
    """Exit code 0 where every mutant was caught by its level and the healthy device raised no alarm."""
    chosen = pick(names)
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        # One process at a time works for each of the two.
        beside = pool.submit(false_alarms, range(draws))
        rows = pool.submit(hunt, chosen, _tell).result()
        alarms, asked = beside.result()
    content = report(rows, alarms, draws=draws, asked=asked, seconds=time.monotonic() - began)
    if key:
        content["signature"] = sign(content, key)
    if out:
        write(out, content)
    _print(rows, alarms, content)
    return 0 if content["verdict"] == "pass" else 1


def pick(names: Sequence[str]) -> list[Mutant]:
    """The mutants of some names or levels, all for none. Raises `ConfigError` for an unknown name."""
    known = [mutant.name for mutant in MUTANTS]
    levels = {mutant.level for mutant in MUTANTS}
    for name in names:
        if name not in known and name not in levels:
            raise ConfigError(
                f"there is no mutant {name!r}{did_you_mean(name, [*known, *levels])}",
                why=f"there are {len(known)}, at the levels {', '.join(sorted(levels))}",
                fix="give names as the score shows them, levels, or nothing for all",
            )
    return [mutant for mutant in MUTANTS if not names or mutant.name in names or mutant.level in names]


def report(
    rows: Sequence[Row], alarms: Sequence[Alarm], *, draws: int, asked: int, seconds: float
) -> dict[str, Any]:
    """The score as plain JSON values, with a digest as other reports have."""
    import torch

    content: dict[str, Any] = {
        "schema": SCHEMA,
        "command": shlex.join(["grpo", *sys.argv[1:]]),
        "mutants": len(rows),
        "caught": sum(row.caught for row in rows),
        "false_alarms": len(alarms),
        "rows": [{**asdict(row), "caught": row.caught} for row in rows],
        "alarms": [asdict(alarm) for alarm in alarms],
        "healthy": {"draws": draws, "cases": asked, "levels": list(HEALTHY_LEVELS)},
        "seconds": round(seconds, 1),
        "environment": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "verdict": "pass" if all(row.caught for row in rows) and not alarms else "fail",
    }
    return content | {"digest": digest(content)}


def _tell(row: Row) -> None:
    print(f"  {'caught' if row.caught else 'MISSED'}  {row.name}", file=sys.stderr, flush=True)


def _print(rows: Sequence[Row], alarms: Sequence[Alarm], content: dict[str, Any]) -> None:
    print_table(
        ["mutant", "level", "caught by", "case", "said"],
        [[row.name, row.level, row.caught_by or "-", row.case, row.message[:WIDTH]] for row in rows],
    )
    for alarm in alarms:
        print(f"false alarm: {alarm.case}, draw {alarm.draw}: {alarm.status}: {alarm.message}")
    print(
        f"\n{content['caught']} of {content['mutants']} mutants caught; {len(alarms)} false alarms in "
        f"{content['healthy']['cases']} cases of {content['healthy']['draws']} draws; "
        f"{content['seconds']:.0f} s"
    )
