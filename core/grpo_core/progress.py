"""What a person sees while a run goes on: a live table on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 12
PHASES = ("rollout", "reward", "logprob", "train", "sync")


class Progress(Protocol):
    """Shows the metrics of steps; a context manager, so that the terminal is left in order."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done; `metrics` are those of the last one."""
        ...

    def note(self, text: str) -> None:
        """A line that stays: an evaluation, a checkpoint, a warning."""
        ...

    def __enter__(self) -> Progress: ...

    def __exit__(self, *exception: object) -> None: ...


def make_progress(total: int, *, first_step: int = 0, stream: TextIO | None = None) -> Progress:
    """A live table when `stream` (stdout) is a terminal, else plain lines.

    `total` is of the whole run, `first_step` counts the steps that a resumed run has finished.
    """
    out = stream if stream is not None else sys.stdout
    made: Progress = LiveTable(total, out) if out.isatty() else PlainLines(total, out)
    if first_step:
        made.note(f"goes on after step {first_step}")
    return made


class PlainLines:
    """One line a step, flushed, fit for a log file."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._reward: float | None = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the step's line."""
        print(plain_line(step, self._total, metrics, self._reward), file=self._stream, flush=True)
        self._reward = metrics.get("reward/mean", self._reward)

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.flush()


class LiveTable:
    """The last steps, redrawn in place."""

    def __init__(self, total: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._total = total
        self._rows: deque[tuple[int, Mapping[str, float], float | None]] = deque(maxlen=ROWS)
        self._reward: float | None = None
        self._seconds: deque[float] = deque(maxlen=20)
        self._last = time.monotonic()
        self._live = Live(console=Console(file=stream), auto_refresh=False, transient=False)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the step's row; an evaluation alone becomes a line above the table."""
        if "reward/mean" not in metrics:
            self.note(plain_line(step, self._total, metrics, None))
            return
        now = time.monotonic()
        self._seconds.append(now - self._last)
        self._last = now
        self._rows.append((step, metrics, self._reward))
        self._reward = metrics.get("reward/mean", self._reward)
        left = (self._total - step) * sum(self._seconds) / len(self._seconds)
        self._live.update(table(list(self._rows), self._total, left, self._live.console.width), refresh=True)

    def note(self, text: str) -> None:
        """Print a line above the table."""
        from rich.text import Text

        self._live.console.print(Text(text))

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last table on the screen."""
        self._live.stop()


COLUMNS = (
    ("length", "length/mean", "{:.0f}"),
    ("entropy", "policy/entropy", "{:.2f}"),
    ("clip", "policy/clip_fraction", "{:.1%}"),
    ("gap", "mismatch/logprob_gap_mean", "{:.4f}"),
    ("grad", "policy/grad_norm", "{:.2f}"),
    ("rollout/s", "throughput/rollout_tokens_per_s", ""),
    ("train/s", "throughput/train_tokens_per_s", ""),
    ("time", "time/step", "{:.1f} s"),
)
ALL_COLUMNS_WIDTH = 78
FEW = ("length", "entropy", "time")
"""What a terminal too narrow for all columns shows besides step and reward."""


def table(
    rows: list[tuple[int, Mapping[str, float], float | None]], total: int, left: float, width: int
) -> Table:
    """The table of (step, metrics, reward of the step before); `left` in seconds, `width` in characters."""
    from rich.table import Table
    from rich.text import Text

    columns = [column for column in COLUMNS if width >= ALL_COLUMNS_WIDTH or column[0] in FEW]
    caption = (
        f"{rows[-1][0]}/{total} steps, about {duration(left)} left; {split(rows[-1][1])}" if rows else ""
    )
    made = Table(
        caption=Text(caption, style="dim"),
        caption_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2 if width >= ALL_COLUMNS_WIDTH + 10 else 1, 0, 0),
    )
    for name in ("step", "reward", *(name for name, _, _ in columns)):
        made.add_column(Text(name, style="dim"), justify="right", no_wrap=True)
    for step, metrics, before in rows:
        reward = Text(number(metrics, "reward/mean", "{:.3f}"))
        delta = change(metrics.get("reward/mean"), before)
        reward.append(f" {delta}", style="green" if delta.startswith("+") else "red")
        cells = [number(metrics, key, form) if form else rate(metrics.get(key)) for _, key, form in columns]
        made.add_row(str(step), reward, *cells)
    return made


def split(metrics: Mapping[str, float]) -> str:
    """Shares of the phases in a step's time, the large ones: "rollout 61% train 35%"."""
    total = metrics.get("time/step", 0.0)
    if not total > 0:
        return ""
    shares = [(name, metrics.get(f"time/{name}", 0.0) / total) for name in PHASES]
    return " ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.05)


def plain_line(step: int, total: int, metrics: Mapping[str, float], before: float | None) -> str:
    """One step as one line; metrics that are absent are left out."""
    parts = [f"step {step}/{total}"]
    if "reward/mean" in metrics:
        delta = change(metrics["reward/mean"], before)
        parts.append(f"reward {metrics['reward/mean']:.2f}" + (f" {delta}" if delta else ""))
    for name, value in metrics.items():
        if name.startswith("eval/") and name.endswith("/reward"):
            parts.append(f"eval {name[5:-7]} {value:.3f}")
    for key, label, form in (
        ("length/mean", "len", "{:.0f}"),
        ("policy/entropy", "entropy", "{:.2f}"),
        ("policy/clip_fraction", "clip", "{:.1%}"),
        ("mismatch/logprob_gap_mean", "gap", "{:.3g}"),
        ("policy/grad_norm", "grad", "{:.2f}"),
    ):
        if key in metrics:
            parts.append(f"{label} {form.format(metrics[key])}")
    for name in ("rollout", "train"):
        if f"throughput/{name}_tokens_per_s" in metrics:
            parts.append(f"{name} {rate(metrics[f'throughput/{name}_tokens_per_s'])} tok/s")
    if "time/step" in metrics:
        parts.append(f"{metrics['time/step']:.1f} s")
    return "  ".join(parts)


def number(metrics: Mapping[str, float], key: str, form: str) -> str:
    """A metric in its format, a dash when it is absent."""
    return form.format(metrics[key]) if key in metrics else "-"


def change(value: float | None, before: float | None) -> str:
    """The change as "+0.02"; empty for the first step."""
    return "" if value is None or before is None else f"{value - before:+.2f}"


def rate(value: float | None) -> str:
    """Tokens per second as 950, 3.1k, 2.4M."""
    if value is None:
        return "-"
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
