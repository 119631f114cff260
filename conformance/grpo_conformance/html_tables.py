"""The tables of a report's page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .bench import duration, percent
from .case import BROKEN
from .known import STALE

NEAR = 0.5
"""Share of the tolerance from which an error is marked as near to it."""
OPEN = 20
"""Failures that are shown at once."""
ORDER = ("fail", "pass", "not_declared")


def text(value: object) -> str:
    """Anything as text of a page."""
    return html.escape(str(value), quote=True)


def tone(status: str) -> str:
    """The class of a verdict or an outcome."""
    return "pass" if status == "pass" else "fail" if status in (*BROKEN, "fail") else "other"


def badge(status: str) -> str:
    """A verdict, coloured."""
    return f'<span class="badge {tone(status)}">{text(status.replace("_", " "))}</span>'


def counted(counts: Mapping[str, int]) -> str:
    """ "3 pass, 1 not declared"."""
    return ", ".join(f"{count} {text(status.replace('_', ' '))}" for status, count in counts.items())


def split(counts: Mapping[str, int]) -> str:
    """A bar of how many cases ended how."""
    total = sum(counts.values()) or 1
    parts: Counter[str] = Counter()
    for status, count in counts.items():
        parts[tone(status)] += count
    bars = "".join(f'<i class="{name}" style="width:{100 * parts[name] / total:.2f}%"></i>' for name in
                   ("fail", "pass", "other") if parts[name])  # fmt: skip
    return f'<div class="split">{bars}</div>'


def error_cell(row: Mapping[str, Any]) -> str:
    """Error beside tolerance, with a bar of its share."""
    if row.get("error") is None:
        return ""
    error, tolerance = row["error"], row.get("tolerance")
    if tolerance is None:
        return f"{error:.3g}"
    share = error / tolerance if tolerance else float("inf") if error else 0.0
    over = not share <= 1.0
    kind = "share over" if over else "share near" if share >= NEAR else "share"
    width = 100.0 if over else 100 * share
    bar = f'<span class="{kind}"><i style="width:{width:.0f}%"></i></span>'
    return f"{error:.3g} / {tolerance:.3g}{bar}"


def inputs(row: Mapping[str, Any]) -> str:
    """What the worst comparison was made with, and what it found."""
    shown = {name: value for name, value in row.get("worst", {}).items() if name != "config"}
    return ", ".join(f"{text(name)} {text(plain(value))}" for name, value in shown.items())


def plain(value: object) -> str:
    """A value of a report as a person writes it."""
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{name} {plain(one)}" for name, one in value.items()) + ")"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def broken_table(content: Mapping[str, Any]) -> Iterator[str]:
    """All that failed, known failures included; what comes after the first `OPEN` is folded."""
    rows = [row for row in content["cases"] if row["status"] in (*BROKEN, "known")]
    if not rows:
        return
    yield f"<h2>What failed ({len(rows)})</h2>"
    yield from _broken_rows(rows[:OPEN])
    if rows[OPEN:]:
        yield f"<details><summary>{len(rows) - OPEN} more</summary>"
        yield from _broken_rows(rows[OPEN:])
        yield "</details>"


def _broken_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield '<div class="scroll"><table><thead><tr><th>case</th><th></th>'
    yield '<th>found</th><th class="num">error / tolerance</th></tr></thead><tbody>'
    for row in rows:
        yield f"<tr><td><code>{text(row['id'])}</code></td><td>{badge(row['status'])}</td>"
        yield f"<td>{text(row.get('message', ''))}<p>{inputs(row)}</p></td>"
        yield f'<td class="num">{error_cell(row)}</td></tr>'
    yield "</tbody></table></div>"


def known_table(content: Mapping[str, Any]) -> Iterator[str]:
    """The vendor's known failures with what became of each."""
    rows = content.get("known", ())
    if not rows:
        return
    yield f"<h2>Known failures ({len(rows)})</h2>"
    yield '<div class="scroll"><table><thead><tr><th>cases</th><th></th><th>reason</th>'
    yield "<th>issue</th></tr></thead><tbody>"
    for row in rows:
        state = str(row.get("state", "used"))
        shown = f'<span class="badge {"fail" if state in STALE else "other"}">{text(state)}</span>'
        count = f"<p>{row['failed']} of {row['cases']} failed</p>" if "failed" in row else ""
        yield f"<tr><td><code>{text(row['case'])}</code></td><td>{shown}{count}</td>"
        yield f"<td>{text(row['reason'])}</td><td>{text(row.get('issue', ''))}</td></tr>"
    yield "</tbody></table></div>"


def offer_table(content: Mapping[str, Any]) -> Iterator[str]:
    """Offers by levels: the worst verdict of what each was asked."""
    found: dict[str, dict[int, str]] = {}
    for row in content["subjects"]:
        said = found.setdefault(row["subject"].rpartition(" ")[2], {})
        before = said.get(row["level"], ORDER[-1])
        said[row["level"]] = min(before, row["verdict"], key=ORDER.index)
    offers = {name: row for name, row in found.items() if ":" in name and not name.startswith("plugin:")}
    asked = {level for said in offers.values() for level in said}
    levels = [row for row in content["levels"] if row["level"] in asked]
    if len(levels) < 2:
        return
    yield '<h2>By offer and level</h2><div class="scroll"><table><thead><tr><th>offer</th>'
    yield "".join(f"<th>{row['level']} {text(row['name'])}</th>" for row in levels)
    yield "</tr></thead><tbody>"
    for name, said in sorted(offers.items()):
        cells = (badge(said[row["level"]]) if row["level"] in said else '<span class="soft">-</span>'
                 for row in levels)  # fmt: skip
        yield f'<tr><td class="id"><code>{text(name)}</code></td>'
        yield f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</tbody></table></div>"


def level_tables(content: Mapping[str, Any]) -> Iterator[str]:
    """For each level but that of speed: every subject with its verdict and its worst case."""
    yield "<h2>By subject, with the worst case</h2>"
    yield "<p>The worst case is that whose error takes most of its tolerance, or the first that failed.</p>"
    for level in content["levels"]:
        rows = [row for row in content["subjects"] if row["level"] == level["level"]]
        if not rows or level["name"] == "speed":
            continue
        measured = any((row["worst"] or {}).get("error") is not None for row in rows)
        yield f"<h3>{level['level']} {text(level['name'])} {badge(level['verdict'])}</h3>"
        yield '<div class="scroll"><table><thead><tr><th>subject</th><th>verdict</th><th>cases</th>'
        yield '<th>worst case</th><th class="num">error / tolerance</th>' if measured else ""
        yield "</tr></thead><tbody>"
        for row in rows:
            yield f'<tr><td class="id"><code>{text(row["subject"])}</code></td>'
            yield f"<td>{badge(row['verdict'])}</td>"
            yield f'<td class="soft">{counted(row["counts"])}</td>'
            yield _worst(row) if measured else ""
            yield "</tr>"
        yield "</tbody></table></div>"


def _worst(row: Mapping[str, Any]) -> str:
    worst = row["worst"] or {}
    name = worst.get("id", "")
    # Level, op and offer are said already.
    for word in reversed(str(row["subject"]).split()):
        before, found, after = name.partition(f"{word}/")
        name = after if found else before
    told = inputs(worst)
    return (
        f'<td title="{text(worst.get("id", ""))}"><code>{text(name)}</code>'
        f'{f"<p>{told}</p>" if told else ""}</td><td class="num">{error_cell(worst)}</td>'
    )


def speed_table(content: Mapping[str, Any]) -> Iterator[str]:
    """Op by op, the fastest offer first."""
    rows = [row for row in content["cases"] if "share_of_bound" in row.get("figures", {})]
    if not rows:
        return
    yield "<h2>Speed</h2><p>For information: nothing fails for being slow. Bytes and FLOPs are counted by "
    yield "formula. Shares are of a copy and a matmul measured beside each offer; the bound is the least "
    yield "time that the two of them allow for these bytes and FLOPs.</p>"
    yield '<div class="scroll"><table><thead><tr><th>op</th><th>offer</th><th>dtype</th>'
    names = ("time", "GB/s", "of copy", "GFLOP/s", "of matmul", "of bound", "x reference")
    yield "".join(f'<th class="num">{name}</th>' for name in names) + "</tr></thead><tbody>"
    ops: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        ops.setdefault(row["subject"].partition(" ")[0], []).append(row)
    for op, offers in ops.items():
        yield from _speed_rows(op, sorted(offers, key=lambda row: row["figures"]["seconds"]))
    yield "</tbody></table></div>"


def _speed_rows(op: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    plain = next((row for row in rows if row["subject"].endswith(" core:reference")), None)
    for place, row in enumerate(rows):
        found, sizes = row["figures"], dict(row.get("worst", {}))
        dtype = sizes.pop("dtype", "")
        listed = ", ".join(f"{name} {value}" for name, value in sizes.items())
        same = plain is not None and plain.get("worst") == row.get("worst")
        times = plain["figures"]["seconds"] / found["seconds"] if plain is not None and same else None
        first = f"<b>{text(op)}</b><p>{text(listed)}</p>" if place == 0 else ""
        yield f"<tr{' class=first' if place == 0 else ''}>"
        yield f'<td rowspan="{len(rows)}">{first}</td>' if place == 0 else ""
        offer = text(row["subject"].partition(" ")[2])
        yield f'<td class="id" title="{text(listed)}"><code>{offer}</code></td>'
        cells = (
            duration(found["seconds"]), f"{found['bytes_per_second'] / 1e9:.2f}",
            percent(found["share_of_copy"]),
            f"{found['flops_per_second'] / 1e9:.1f}" if found["flops"] else "-",
            percent(found["share_of_matmul"]) if found["flops"] else "-", _bound(found["share_of_bound"]),
            f"{times:.2f}" if times else "-",
        )  # fmt: skip
        yield f"<td>{text(dtype)}</td>" + "".join(f'<td class="num">{cell}</td>' for cell in cells) + "</tr>"


def _bound(share: float) -> str:
    bar = f'<span class="share"><i style="width:{min(100.0, 100 * share):.0f}%"></i></span>'
    return f"{percent(share)}{bar}"


def absent_list(content: Mapping[str, Any]) -> Iterator[str]:
    """What was not asked, with the reasons, folded."""
    rows = [row for row in content["cases"] if row["status"] == "not_declared"]
    if not rows:
        return
    yield f"<h2>Not declared ({len(rows)})</h2><details><summary>what was not asked, and why</summary>"
    yield '<div class="scroll"><table><tbody>'
    for row in rows:
        yield f"<tr><td><code>{text(row['id'])}</code></td><td>{text(row.get('message', ''))}</td></tr>"
    yield "</tbody></table></div></details>"
