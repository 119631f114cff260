"""The tables of a report: samples with their rewards, ops, configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .read import RunData
from .text import number, text

SAMPLE_STEPS = 2
"""Steps at each end of the run whose samples are shown."""
SAMPLE_ROWS = 8
"""Samples shown of one step."""
SAMPLE_COLUMNS = ("reward", "advantage", "prompt", "completion", "answer")


def samples(run: RunData, place: int, many: bool) -> Iterator[str]:
    """Tables of completions of the first and the last steps."""
    steps = sorted({int(row["step"]) for row in run.samples})
    shown = steps if len(steps) <= 2 * SAMPLE_STEPS else [*steps[:SAMPLE_STEPS], *steps[-SAMPLE_STEPS:]]
    for step in shown:
        rows = [row for row in run.samples if row["step"] == step]
        of = f' <span class="name c{place % 6}"><i></i>{text(run.label, 200)}</span>' if many else ""
        opened = " open" if step in (shown[0], shown[-1]) else ""
        yield (
            f"<details{opened}><summary>Step {step}{of}</summary>"
            f'<div class="scroll"><table class="samples">{_head(*SAMPLE_COLUMNS)}'
            f"<tbody>{''.join(map(_sample, rows[:SAMPLE_ROWS]))}</tbody></table></div></details>"
        )


def _sample(row: Mapping[str, Any]) -> str:
    parts = row.get("rewards")
    single = ""
    if isinstance(parts, dict) and len(parts) > 1:
        single = "".join(f"<em>{text(name, 60)} {number(value)}</em>" for name, value in parts.items())
    cut = "<em>cut at the token limit</em>" if row.get("finish_reason") == "length" else ""
    advantage = row.get("advantage")
    sign = (
        ""
        if not isinstance(advantage, int | float) or advantage == 0
        else " up"
        if advantage > 0
        else " down"
    )
    answer = row.get("answer")
    return (
        f'<tr><td class="num">{number(row.get("reward"))}{single}</td>'
        f'<td class="num{sign}">{number(advantage, "+.2f")}</td>'
        f'<td><pre dir="auto">{text(row.get("prompt", ""))}</pre></td>'
        f'<td><pre dir="auto">{text(row.get("completion", ""))}</pre>{cut}</td>'
        f'<td><pre dir="auto">{"" if answer is None else text(answer, 400)}</pre></td></tr>'
    )


def _head(*names: str) -> str:
    return f"<thead><tr>{''.join(f'<th>{name}</th>' for name in names)}</tr></thead>"


def details(run: RunData) -> Iterator[str]:
    """The op table, the configuration and the environment of a run, folded."""
    choices = run.plan.get("choices")
    if isinstance(choices, list) and choices:
        rows = "".join(_choice(row) for row in choices if isinstance(row, dict))
        yield (
            f'<details><summary>What served each op: {text(run.label, 200)}</summary><div class="scroll">'
            f"<table>{_head('op', 'implementation', 'why')}<tbody>{rows}</tbody></table></div></details>"
        )
    if run.config_text:
        yield (
            f"<details><summary>Configuration: {text(run.label, 200)}</summary>"
            f'<pre class="config">{text(run.config_text, 50_000)}</pre></details>'
        )
    packages = run.environment.get("packages")
    if isinstance(packages, dict):
        named = ", ".join(f"{text(name, 60)} {text(version, 40)}" for name, version in packages.items())
        yield f"<details><summary>Environment: {text(run.label, 200)}</summary><p>{named}</p></details>"


def _choice(row: Mapping[str, Any]) -> str:
    cover = f" (covered by {text(row['covered_by'], 80)})" if row.get("covered_by") else ""
    return (
        f"<tr><td><code>{text(row.get('op', ''), 80)}</code></td>"
        f"<td><code>{text(row.get('chosen') or 'none', 120)}</code>{cover}</td>"
        f"<td>{text(row.get('reason', ''), 400)}</td></tr>"
    )
