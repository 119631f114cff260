"""Write the report of one run, or of several laid over each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import charts
from .compared import contrasts, distances
from .differences import compare
from .read import RunData, read_runs
from .style import STYLE
from .svg import value_text
from .tables import details, samples
from .text import text

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Should anything slip through the escaping, the browser still loads and runs nothing."""


def write_report(run_dirs: Sequence[Path], out: Path, *, twins: Sequence[Path] = ()) -> Path:
    """One self-contained page: no script, nothing loaded from anywhere.

    `twins` are runs like the first, from weights changed by a rounding: they tell how far right runs are
    apart, and are not shown. Raises `ConfigError` for a folder without metrics.jsonl.
    """
    page = _page(read_runs(run_dirs), read_runs(twins))
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def _page(runs: Sequence[RunData], twins: Sequence[RunData]) -> str:
    labels = [text(run.label) for run in runs]
    title = " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)
    found = "".join(charts(runs))
    beside = compare(runs, twins) if len(runs) > 1 else []
    body = [
        f"<h1>{title}</h1>",
        '<div class="runs">',
        *(_card(run, number, len(runs) > 1) for number, run in enumerate(runs)),
        "</div>",
        *(distances(beside) if beside else ()),
        f'<section class="charts">{found}</section>'
        if found
        else '<p class="none">No step was finished yet.</p>',
        *(contrasts(beside) if beside else ()),
    ]
    if any(run.samples for run in runs):
        body.append("<h2>Samples</h2>")
        body += [part for number, run in enumerate(runs) for part in samples(run, number, len(runs) > 1)]
    body.append("<h2>Details</h2>")
    body += [part for run in runs for part in details(run)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} - grpo report</title><style>{STYLE}</style></head><body><main>"
        f"{''.join(body)}</main></body></html>\n"
    )


def _card(run: RunData, number: int, many: bool) -> str:
    device = run.plan.get("device")
    device_name = " ".join(
        str(part) for part in (device.get("name"), device.get("type")) if part
    ) if isinstance(device, dict) else str(run.config.get("device", ""))  # fmt: skip
    line = [f"<b>{text(run.config.get('model', 'unknown model'), 200)}</b>", text(device_name, 200)]
    if run.plan.get("id"):
        line.append(f"plan {text(run.plan['id'], 40)}")
    if run.environment.get("started"):
        line.append(text(run.environment["started"], 40))
    head = f'<div class="name c{number % 6}"><i></i>{text(run.label, 200)}</div>' if many else ""
    tiles = "".join(
        f'<div class="tile"><span>{name}</span><b>{shown}</b><em>{note}</em></div>'
        for name, shown, note in _tiles(run)
    )
    return f'<div class="card">{head}<p>{" &middot; ".join(line)}</p><div class="tiles">{tiles}</div></div>'


def _tiles(run: RunData) -> Iterator[tuple[str, str, str]]:
    total = _setting(run.config, "train", "steps")
    done = int(run.rows[-1]["step"]) if run.rows else 0
    yield "steps", f"{done}", f"of {text(total, 20)}" if total else ""
    reward = _values(run, "reward/mean")
    if reward:
        size = max(1, len(reward) // 10)
        first, last = sum(reward[:size]) / size, sum(reward[-size:]) / size
        yield "reward", f"{last:.3f}", f"{last - first:+.3f} since start"
    for name in run.names():
        values = _values(run, name)
        if name.startswith("eval/") and name.endswith("/reward") and values:
            yield f"eval {text(name[5:-7], 40)}", f"{values[-1]:.3f}", f"{values[0]:.3f} at first"
    for name, label, unit in (
        ("length/mean", "length", "tokens, last step"),
        ("throughput/rollout_tokens_per_s", "rollout", "tokens/s, median"),
        ("throughput/train_tokens_per_s", "train", "tokens/s, median"),
        ("mismatch/logprob_gap_mean", "log-prob gap", "median"),
        ("memory/peak_gb", "memory", "GB at the peak"),
    ):
        values = _values(run, name)
        if values:
            shown = values[-1] if label == "length" else max(values) if label == "memory" else _median(values)
            yield label, value_text(shown), unit
    seconds = sum(_values(run, "time/step"))
    if seconds:
        yield (
            "time",
            _duration(seconds),
            f"{value_text(seconds / max(1, len(_values(run, 'time/step'))))} s a step",
        )


def _values(run: RunData, name: str) -> list[float]:
    return [value for _, value in run.points(name) if value is not None]


def _setting(config: Mapping[str, Any], section: str, key: str) -> Any:
    found = config.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d}"
