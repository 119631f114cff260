"""Scales, ticks and shapes of the charts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_BARS,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    fit,
    line_chart,
    nice_ticks,
    percent_text,
    power_text,
    stacked_bars,
    thin,
    value_text,
)

FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(low=FINITE, size=st.floats(1e-6, 1e12))
@settings(max_examples=200, deadline=None)
def test_ticks_are_few_round_and_span_the_range(low: float, size: float) -> None:
    high = low + size
    if high <= low or size < abs(low) * 1e-9:
        return
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7
    assert float(f"{step:.0e}".split("e")[0]) in (1, 2, 5)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.none() | FINITE), min_size=1, max_size=30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_point_is_drawn_inside_the_frame(points: list[tuple[int, float | None]], zero: bool) -> None:
    points = sorted({x: (float(x), y) for x, y in points}.values())
    if all(y is None for _, y in points):
        return
    drawn = ET.fromstring(line_chart("t", [Series(label="a<b", style="c0", points=points)], zero=zero))
    circles = drawn.findall(".//circle")
    assert len(circles) == sum(y is not None for _, y in points)
    for circle in circles:
        assert LEFT - 0.1 <= float(circle.attrib["cx"]) <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= float(circle.attrib["cy"]) <= HEIGHT - BOTTOM + 0.1


def test_points_keep_their_order_and_proportion() -> None:
    frame, _ = fit([0, 10], [0.0, 4.0], zero=True)
    assert frame.y(0) == HEIGHT - BOTTOM
    assert frame.y(4) == TOP
    assert frame.y(1) == pytest.approx(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) / 4)
    assert frame.x(5) == pytest.approx((LEFT + WIDTH - RIGHT) / 2)


def test_a_gap_breaks_the_line() -> None:
    points = [(1.0, 1.0), (2.0, None), (3.0, 2.0), (4.0, 3.0)]
    path = re.search(
        r'class="curve" d="([^"]*)"', line_chart("t", [Series(label="a", style="c0", points=points)])
    )
    assert path is not None
    assert [command for command in path[1] if command.isalpha()] == ["M", "M", "L"]


def test_long_curves_are_thinned_to_means() -> None:
    points = [(float(x), float(x)) for x in range(1000)]
    short = thin(Series(label="a", style="c0", points=points, band=[(x, x, x) for x, _ in points]))
    assert len(short.points) == len(short.band) == 334 <= MAX_POINTS
    assert short.points[0] == (1.0, 1.0)
    assert short.points[-1] == (999.0, 999.0)


def test_bars_stack_to_the_total() -> None:
    drawn = ET.fromstring(stacked_bars("t", [1, 2], [("a", "p0", [1.0, 2.0]), ("b", "p1", [3.0, 0.0])]))
    bars = [(float(bar.attrib["y"]), float(bar.attrib["height"])) for bar in drawn.findall("rect")]
    unit = (HEIGHT - TOP - BOTTOM) / 4
    assert bars[0] == pytest.approx((HEIGHT - BOTTOM - unit, unit), abs=0.1)
    assert bars[1] == pytest.approx((TOP, 3 * unit), abs=0.1)
    assert bars[3][1] == 0


def test_many_steps_share_bars() -> None:
    steps = [float(step) for step in range(1000)]
    drawn = ET.fromstring(stacked_bars("t", steps, [("a", "p0", [1.0] * 1000)]))
    assert len(drawn.findall("rect")) <= MAX_BARS


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [
        (0.25, value_text, "0.25"),
        (0.018, percent_text, "1.8%"),
        (3100, value_text, "3100"),
        (52_000, value_text, "52k"),
        (2.5e6, value_text, "2.5M"),
        (1e-6, value_text, "1e-06"),
        (0.0, value_text, "0"),
        (-3.0, value_text, "-3"),
        (1234.5, value_text, "1234"),
        (1e-17, value_text, "0"),
        (-5.0, power_text, "1e-05"),
        (-4.5, power_text, "3.2e-05"),
    ],
)
def test_numbers_are_short(value: float, form: Callable[[float], str], shown: str) -> None:
    assert form(value) == shown
