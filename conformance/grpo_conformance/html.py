"""The report as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .html_style import STYLE
from .html_tables import (
    absent_list,
    badge,
    broken_table,
    counted,
    known_table,
    level_tables,
    offer_table,
    speed_table,
    split,
    text,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(content: Mapping[str, Any]) -> str:
    """HTML of a report: no script, nothing loaded from anywhere."""
    title = f"{_subject(content)}: {content['verdict']}"
    body = "".join(_body(content))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)} - conformance</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _subject(content: Mapping[str, Any]) -> str:
    """What was judged: a model family where the report has one, else the device."""
    return str(content["model"]["family"] if "model" in content else content["target"]["device"])


def _body(content: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h1>{text(_subject(content))} {badge(content['verdict'])}</h1>"
    yield from _about(content)
    if content["target"]["simulated"]:
        yield '<p class="banner">A simulated device: this shows that software and suite fit, and nothing '
        yield "about the numbers or the speed of hardware.</p>"
        limits = content["target"].get("limits", ())
        if limits:
            yield "<ul>" + "".join(f"<li>{text(limit)}</li>" for limit in limits) + "</ul>"
    yield '<div class="tiles">'
    for level in content["levels"]:
        empty = "" if level["counts"] else " none"
        yield f'<div class="tile{empty}"><span>{level["level"]} {text(level["name"])}</span>'
        yield f"<b>{badge(level['verdict'])}</b>{split(level['counts'])}"
        yield f"<span>{counted(level['counts']) or 'no case'}</span><span>{level['seconds']} s</span></div>"
    yield "</div>"
    yield from broken_table(content)
    yield from known_table(content)
    yield from offer_table(content)
    yield from level_tables(content)
    yield from speed_table(content)
    yield from absent_list(content)


def _about(content: Mapping[str, Any]) -> Iterator[str]:
    target, made = content["target"], content["environment"]
    on = "computed on " if "model" in content else ""
    memory = f", {target['memory_bytes'] / 2**30:.1f} GiB" if target.get("memory_bytes") else ""
    if "model" in content:
        model = content["model"]
        where = f" of {text(model['folder'])}" if model["folder"] else ""
        yield f"<p>{text(', '.join(model['architectures']))}{where}"
        yield ", tiny models with random weights beside those of transformers</p>"
    chip = " ".join(filter(None, (target["name"], target["vendor"])))
    yield f"<p>{on}{text(chip)}, {target['count']} device(s) of type "
    yield f"{text(target['type'])}{memory}; dtypes {text(', '.join(target['dtypes']))}</p>"
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items() if version)
    yield f"<p>Python {text(made['python'])}, {text(packages)}; {text(made['platform'])}</p>"
    yield f"<p><code>{text(content['command'])}</code>{' (quick)' if content['quick'] else ''}</p>"
    yield f"<p>digest <code>{text(content['digest'])}</code>"
    yield f"{', signed' if content.get('signature') else ', not signed'}</p>"
