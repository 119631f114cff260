"""The part of a report about several runs: verdicts, distances, and what differs in plans and settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .differences import Comparison, dtype_of
from .read import RunData
from .svg import Series, line_chart
from .text import text

SMALLEST = 1e-9
"""Distances below are drawn here: equal numbers have no logarithm."""
ROWS = 12
"""Metrics of the table of differences."""
QUIET = ("run.dir", "run.name")
"""Settings that any two runs differ in."""
NONE = '<span class="none">-</span>'


def distances(found: Sequence[Comparison]) -> Iterator[str]:
    """How far runs are from the first, and what to think of it."""
    yield f'<section class="charts">{_distance(found)}<div class="chart verdicts">'
    yield from (_verdict(one, place) for place, one in enumerate(found, start=1))
    yield "</div></section>"


def contrasts(found: Sequence[Comparison]) -> Iterator[str]:
    """Tables of what differs: metrics, devices and settings, and what served each op."""
    runs = [found[0].first, *(one.run for one in found)]
    yield "<h2>What differs</h2>"
    yield _differences(found)
    yield _table(["", *_names(runs)], _about(runs))
    rows = list(_choices(runs))
    if rows:
        yield _table(["op served otherwise", *_names(runs)], rows)


def verdict(one: Comparison) -> str:
    """One line in words about a run beside the first."""
    kept = f"{one.followed} of {one.steps} steps"
    if one.problem:
        return f"not within the band: {one.problem}"
    largest = max((off for _, off in one.gaps), default=0.0)
    drew = ""
    if one.parted is not None:
        drew = f"; in step {one.parted:g} {one.apart[0]} of {one.apart[1]} completions were drawn otherwise"
    limit = dict(one.allowed)
    shares = [off / limit[step] for step, off in one.gaps if step in limit]
    if not shares:
        apart = f", at most {largest:.1e} apart" if one.gaps else ""
        same = f"{kept} with the same completions{apart}{drew}"
        return f"{same}; a twin tells nothing of them" if one.twins else same
    judged = "" if len(shares) == len(one.gaps) else f", {len(shares)} judged"
    return f"within the band: {kept}{judged}, at most {max(shares):.0%} of what is allowed{drew}"


def _verdict(one: Comparison, place: int) -> str:
    limit = dict(one.allowed)
    judged = any(step in limit for step, _ in one.gaps)
    state = " bad" if one.problem else " good" if judged else ""
    return (
        f'<p class="verdict{state}"><span class="name c{place % 6}"><i></i>{text(one.run.label, 200)}</span>'
        f"{text(verdict(one))}</p>"
    )


def _distance(found: Sequence[Comparison]) -> str:
    series = [
        Series(label=one.run.label, style=f"c{place % 6}", points=_logs(one.gaps))
        for place, one in enumerate(found, start=1)
        if one.gaps
    ]
    allowed = _logs(found[0].allowed)
    if allowed:
        series.append(Series(label="allowed", style="soft", points=allowed, dashed=True))
    if not series:
        return '<p class="none">The runs have no step with the same completions.</p>'
    keys = "".join(
        f'<span class="key c{place % 6}"><i></i>{text(one.run.label)}</span>'
        for place, one in enumerate(found, start=1)
    )
    if allowed:
        keys += '<span class="key soft dash"><i></i>allowed</span>'
    first = text(found[0].first.label)
    note = "largest difference of a followed metric, relative to max(1, its value); up to where tokens differ"
    return (
        f'<figure class="chart"><figcaption><b>Distance from {first}</b><span>{note}</span></figcaption>'
        f'<div class="legend">{keys}</div>{line_chart("Distance from " + first, series, log=True)}</figure>'
    )


def _logs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float | None]]:
    return [(x, math.log10(max(y, SMALLEST)) if math.isfinite(y) else None) for x, y in points]


def _differences(found: Sequence[Comparison]) -> str:
    """Largest difference of each metric, for each run after the first."""
    by_name: dict[str, dict[int, str]] = {}
    order: dict[str, float] = {}
    for place, one in enumerate(found):
        for row in one.differences:
            relative = row.relative
            order[row.name] = max(order.get(row.name, 0.0), relative)
            shown = "0" if row.off == 0 else f"{row.off:.2g}<em>step {row.step:g}, of {row.first:.4g}</em>"
            by_name.setdefault(row.name, {})[place] = shown
    names = sorted((name for name in order if order[name] > 0), key=lambda name: -order[name])[:ROWS]
    rows = [[f"<code>{text(n)}</code>", *(by_name[n].get(i, NONE) for i in range(len(found)))] for n in names]
    rest = f"; {len(order) - len(names)} metrics with smaller ones or none are left out"
    head = "largest difference" + (rest if len(order) > len(names) else "")
    return _table([head, *(text(one.run.label, 200) for one in found)], rows) if rows else ""


def _about(runs: Sequence[RunData]) -> Iterator[list[str]]:
    """Rows about the devices, then the settings that differ."""
    facts = {
        "device": [_device(run, "name") or str(run.config.get("device", "")) for run in runs],
        "type": [_device(run, "type") for run in runs],
        "vendor": [_device(run, "vendor") for run in runs],
        "computed in": [dtype_of(run) for run in runs],
        "plan": [str(run.plan.get("id", "")) for run in runs],
    }
    for name, shown in facts.items():
        yield [name, *(text(value, 120) or NONE for value in shown)]
    flat = [dict(_flat(run.config)) for run in runs]
    for key in sorted({key for one in flat for key in one} - set(QUIET)):
        values = [one.get(key, "") for one in flat]
        if len(set(values)) > 1:
            yield [f"<code>{text(key)}</code>", *(text(value, 120) or NONE for value in values)]
    versions = [run.environment.get("packages") for run in runs]
    packages = [one if isinstance(one, dict) else {} for one in versions]
    for name in sorted({name for one in packages for name in one}):
        values = [str(one.get(name, "")) for one in packages]
        if len(set(values)) > 1:
            yield [f"package {text(name, 60)}", *(text(value, 60) or NONE for value in values)]


def _device(run: RunData, key: str) -> str:
    device = run.plan.get("device")
    return str(device.get(key) or "") if isinstance(device, dict) else ""


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Settings by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _choices(runs: Sequence[RunData]) -> Iterator[list[str]]:
    """Ops that not all runs have from the same offer."""
    tables = [dict(_chosen(run)) for run in runs]
    for op in sorted({op for table in tables for op in table}):
        values = [table.get(op, "") for table in tables]
        if len(set(values)) > 1:
            yield [f"<code>{text(op, 80)}</code>", *(_code(value) for value in values)]


def _code(value: str) -> str:
    return f"<code>{text(value, 120)}</code>" if value else NONE


def _chosen(run: RunData) -> Iterator[tuple[str, str]]:
    choices = run.plan.get("choices")
    for row in choices if isinstance(choices, list) else ():
        if isinstance(row, dict):
            yield str(row.get("op", "")), str(row.get("covered_by") or row.get("chosen") or "")


def _names(runs: Sequence[RunData]) -> list[str]:
    return [
        f'<span class="name c{place % 6}"><i></i>{text(run.label, 200)}</span>'
        for place, run in enumerate(runs)
    ]


def _table(head: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="card scroll"><table class="compared"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
