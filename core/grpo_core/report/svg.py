"""Line charts and stacked bars as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .text import text

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
MAX_POINTS = 400
MAX_BARS = 90
MAX_DOTS = 120
"""Points that tell their value when the mouse is over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve."""

    label: str
    style: str
    """Class of the style sheet that gives the colour: "c0", "c1", ..."""
    points: Sequence[tuple[float, float | None]]
    """(step, value), by step; None breaks the line."""
    band: Sequence[tuple[float, float, float]] = ()
    """(step, low, high)"""
    dashed: bool = False
    under: bool = False
    """Broad and pale, for a curve that others lie upon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The mapping from data to the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        """Horizontal place."""
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Vertical place."""
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str, series: Sequence[Series], *, zero: bool = False, percent: bool = False, log: bool = False
) -> str:
    """Curves over the step. `zero` starts the axis at 0; `percent` writes fractions as percentages; with
    `log` the points and bands are logarithms to the base 10, shown as what they are of."""
    shown = percent_text if percent else power_text if log else value_text
    drawn = [thin(one) for one in series if any(value is not None for _, value in one.points)]
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points if y is not None]
    ys += [y for one in drawn for _, low, high in one.band for y in (low, high)]
    frame, ticks = fit(xs, ys, zero=zero)
    if log:
        ticks = [tick for tick in ticks if tick == round(tick)]
    parts = [axes(frame, ticks, shown)]
    parts += [_band(one, frame) for one in drawn if one.band]
    parts += [_line(one, frame, shown) for one in drawn]
    return _svg(title, parts)


def stacked_bars(
    title: str, steps: Sequence[float], layers: Sequence[tuple[str, str, Sequence[float]]]
) -> str:
    """Bars over the step; `layers` are (label, style class, one value for each step), from the bottom up."""
    size = math.ceil(len(steps) / MAX_BARS)
    starts = range(0, len(steps), size)
    means = [[_mean(values[start : start + size]) for start in starts] for _, _, values in layers]
    tops = [sum(column) for column in zip(*means, strict=True)]
    frame, ticks = fit([steps[0] - size, steps[-1] + size], tops, zero=True)
    width = max(0.8, (frame.x(size) - frame.x(0)) * 0.82)
    parts = [axes(frame, ticks, value_text)]
    for number, start in enumerate(starts):
        base, centre = 0.0, _mean(steps[start : start + size])
        for (label, style, _), values in zip(layers, means, strict=True):
            low, high = frame.y(base), frame.y(base + values[number])
            base += values[number]
            parts.append(
                f'<rect class="bar {style}" x="{frame.x(centre) - width / 2:.1f}" y="{high:.1f}"'
                f' width="{width:.1f}" height="{max(low - high, 0):.1f}">'
                f"<title>step {centre:g}: {text(label)} {values[number]:.3g} s</title></rect>"
            )
    return _svg(title, parts)


def fit(xs: Sequence[float], ys: Sequence[float], *, zero: bool) -> tuple[Frame, list[float]]:
    """A frame that holds all points, and the places of the horizontal lines."""
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    low, high = min(ys), max(ys)
    if zero and low >= 0:
        low = 0.0
    if high - low < 1e-12 * max(abs(high), 1e-300) or high == low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if zero and low == 0 else low - pad), high + pad
    ticks = nice_ticks(low, high)
    return Frame(x0=x0, x1=x1, y0=min(low, ticks[0]), y1=max(high, ticks[-1])), ticks


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span [low, high] or nearly do."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thin(series: Series) -> Series:
    """At most MAX_POINTS points: means of neighbours."""
    size = math.ceil(len(series.points) / MAX_POINTS)
    if size <= 1:
        return series
    points = []
    for start in range(0, len(series.points), size):
        part = series.points[start : start + size]
        values = [value for _, value in part if value is not None]
        points.append((_mean([x for x, _ in part]), _mean(values) if values else None))
    band = []
    for start in range(0, len(series.band), size):
        rows = series.band[start : start + size]
        band.append((_mean([r[0] for r in rows]), _mean([r[1] for r in rows]), _mean([r[2] for r in rows])))
    return replace(series, points=points, band=band)


def axes(frame: Frame, ticks: Sequence[float], shown: Callable[[float], str]) -> str:
    """Horizontal lines with their values, and steps below."""
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_label(LEFT - 7, y + 3.5, "end", shown(tick)))
    for tick in nice_ticks(frame.x0, frame.x1, 7):
        if frame.x0 <= tick <= frame.x1 and tick == round(tick):
            parts.append(_label(frame.x(tick), HEIGHT - 8, "middle", f"{tick:g}"))
    return "".join(parts)


def _label(x: float, y: float, anchor: str, shown: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'


def percent_text(value: float) -> str:
    """A fraction as 40%."""
    return f"{value * 100:.3g}%"


def power_text(value: float) -> str:
    """Ten to the power of the value, as 3e-05."""
    return f"{10**value:.2g}"


def value_text(value: float) -> str:
    """A number in few characters: 0.25, 12, 3.1k, 2e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-12:
        return "0"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


def _line(series: Series, frame: Frame, shown: Callable[[float], str]) -> str:
    path, pen = [], "M"
    few = len(series.points) <= 30
    every = math.ceil(len(series.points) / MAX_DOTS)
    dots = []
    for place, (x, y) in enumerate(series.points):
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
        pen = "L"
        if place % every == 0:
            at = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{2.2 if few else 5}"'
            told = f"{text(series.label)}, step {x:g}: {shown(y)}"
            dots.append(f'<circle class="dot{"" if few else " far"}" {at}><title>{told}</title></circle>')
    kind = "curve" + (" dashed" if series.dashed else "") + (" under" if series.under else "")
    return f'<g class="{series.style}"><path class="{kind}" d="{"".join(path)}"/>{"".join(dots)}</g>'


def _band(series: Series, frame: Frame) -> str:
    upper = [f"{frame.x(x):.1f} {frame.y(high):.1f}" for x, _, high in series.band]
    lower = [f"{frame.x(x):.1f} {frame.y(low):.1f}" for x, low, _ in reversed(series.band)]
    return f'<path class="band {series.style}" d="M{"L".join(upper + lower)}Z"/>'


def _svg(title: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
