"""The report as one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from .report import BROKEN

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--text:#1d1f23;--soft:#676c75;--line:#e4e4e0;
--pass:#13804f;--fail:#c0392b;--other:#8a6d1d}
@media (prefers-color-scheme:dark){:root{--bg:#131519;--card:#1b1e24;--text:#e6e7ea;--soft:#989ea9;
--line:#2d323b;--pass:#58cf95;--fail:#ff8a7d;--other:#d8bf63}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 22px 60px}
h1{font-size:24px;margin:0 0 6px}h2{font-size:18px;margin:32px 0 8px}
p{margin:4px 0;color:var(--soft);overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:8px 14px;min-width:130px}
.tile span{display:block;font-size:12px;color:var(--soft)}.tile b{font-size:17px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:4px 14px}
table{border-collapse:collapse;width:100%}
th{text-align:left;font-size:12px;font-weight:500;color:var(--soft);padding:6px 12px 6px 0}
td{border-top:1px solid var(--line);padding:6px 12px 6px 0;vertical-align:top}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.num{font-variant-numeric:tabular-nums;white-space:nowrap}
.pass{color:var(--pass)}.fail{color:var(--fail)}.other{color:var(--other)}
details{margin:4px 0}summary{cursor:pointer}
.banner{border-left:4px solid var(--other);padding:6px 12px;background:var(--card);margin:12px 0}
"""


def page(content: Mapping[str, Any]) -> str:
    """HTML of a report: no script, nothing loaded from anywhere."""
    target = content["target"]
    title = f"{target['device']}: {content['verdict']}"
    body = "".join(_body(content))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)} - conformance</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _body(content: Mapping[str, Any]) -> Iterator[str]:
    target, made = content["target"], content["environment"]
    said = content["verdict"]
    yield f'<h1>{_text(target["device"])}: <span class="{_tone(said)}">{_text(said)}</span></h1>'
    yield f"<p>{_text(target['name'])} {_text(target['vendor'])}, {target['count']} device(s) of type "
    yield f"{_text(target['type'])}; dtypes {_text(', '.join(target['dtypes']))}</p>"
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    yield f"<p>Python {_text(made['python'])}, {_text(packages)}; {_text(made['platform'])}</p>"
    yield f"<p><code>{_text(content['command'])}</code></p><p>{_text(content['digest'])}"
    yield f"{', signed' if content.get('signature') else ', not signed'}</p>"
    if target["simulated"]:
        yield '<p class="banner">A simulated device: this shows that software and suite fit, and nothing '
        yield "about the numbers or the speed of hardware.</p>"
    yield '<div class="tiles">'
    for level in content["levels"]:
        counted = ", ".join(f"{count} {_text(status)}" for status, count in level["counts"].items())
        yield f'<div class="tile"><span>{level["level"]} {_text(level["name"])}</span>'
        yield f'<b class="{_tone(level["verdict"])}">{_text(level["verdict"])}</b>'
        yield f"<span>{counted or 'no case'}</span></div>"
    yield "</div>"
    yield from _broken(content)
    yield from _subjects(content)


def _broken(content: Mapping[str, Any]) -> Iterator[str]:
    rows = [row for row in content["cases"] if row["status"] in (*BROKEN, "known")]
    if not rows:
        return
    yield f'<h2>What failed ({len(rows)})</h2><div class="scroll"><table><thead><tr><th>case</th><th></th>'
    yield "<th>found</th></tr></thead><tbody>"
    for row in rows:
        inputs = "".join(f"<br>{_text(k)}: {_text(v)}" for k, v in row.get("worst", {}).items())
        yield f"<tr><td><code>{_text(row['id'])}</code></td>"
        yield f'<td class="{_tone(row["status"])}">{_text(row["status"])}</td>'
        yield f"<td>{_text(row.get('message', ''))}{_error(row)}<p>{inputs}</p></td></tr>"
    yield "</tbody></table></div>"


def _subjects(content: Mapping[str, Any]) -> Iterator[str]:
    yield '<h2>By offer</h2><div class="scroll"><table><thead><tr><th>level</th><th>subject</th>'
    yield "<th>verdict</th><th>cases</th><th>worst case</th><th>error / tolerance</th></tr></thead><tbody>"
    for row in content["subjects"]:
        worst = row["worst"] or {}
        counted = ", ".join(f"{count} {_text(status)}" for status, count in row["counts"].items())
        yield f'<tr><td class="num">{row["level"]}</td><td><code>{_text(row["subject"])}</code></td>'
        yield f'<td class="{_tone(row["verdict"])}">{_text(row["verdict"])}</td><td>{counted}</td>'
        yield f'<td><code>{_text(worst.get("id", ""))}</code></td><td class="num">{_error(worst)}</td></tr>'
    yield "</tbody></table></div>"


def _error(row: Mapping[str, Any]) -> str:
    if row.get("error") is None:
        return ""
    tolerance = row.get("tolerance")
    return f" {row['error']:.3g} / {tolerance:.3g}" if tolerance is not None else f" {row['error']:.3g}"


def _tone(status: str) -> str:
    return "pass" if status == "pass" else "fail" if status in (*BROKEN, "fail") else "other"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)
