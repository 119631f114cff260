"""Lines and tables that a person sees."""

from __future__ import annotations

import io
import re

import pytest

from grpo_core.progress import LiveTable, PlainLines, change, duration, make_progress, plain_line, rate, split

STEP = {
    "reward/mean": 0.41, "length/mean": 31.4, "policy/entropy": 1.2, "policy/clip_fraction": 0.018,
    "mismatch/logprob_gap_mean": 0.004, "throughput/rollout_tokens_per_s": 3100.0,
    "throughput/train_tokens_per_s": 5200.0, "time/step": 1.9, "time/rollout": 1.0, "time/train": 0.8,
    "time/reward": 0.01,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_plain_line() -> None:
    assert plain_line(12, 200, STEP, 0.39) == (
        "step 12/200  reward 0.41 +0.02  len 31  entropy 1.20  clip 1.8%  gap 0.004"
        "  rollout 3.1k tok/s  train 5.2k tok/s  1.9 s"
    )


def test_what_is_absent_is_left_out() -> None:
    assert plain_line(1, 2, {}, None) == "step 1/2"
    assert plain_line(1, 2, {"reward/mean": -0.5}, None) == "step 1/2  reward -0.50"


def test_an_evaluation_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"eval/sums/reward": 0.5, "eval/sums/length": 3.0}
    assert plain_line(10, 20, metrics, 0.1) == "step 10/20  eval sums 0.500"
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with make_progress(20, stream=stream) as progress:
        progress.step(9, STEP)
        progress.step(10, metrics)
    assert "step 10/20  eval sums 0.500" in stream.getvalue()
    assert "nan" not in stream.getvalue()


def test_lines_go_to_a_stream_that_is_no_terminal() -> None:
    stream = io.StringIO()
    with make_progress(3, first_step=1, stream=stream) as progress:
        assert isinstance(progress, PlainLines)
        progress.step(2, {"reward/mean": 0.5})
        progress.note("evaluation: 0.7")
        progress.step(3, {"reward/mean": 0.25})
    assert stream.getvalue().splitlines() == [
        "goes on after step 1",
        "step 2/3  reward 0.50",
        "evaluation: 0.7",
        "step 3/3  reward 0.25 -0.25",
    ]


def test_the_table_shows_the_last_steps_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with make_progress(40, stream=stream) as progress:
        assert isinstance(progress, LiveTable)
        for step in range(1, 31):
            progress.step(step, {**STEP, "reward/mean": step / 100})
        progress.note("[bold]saved[/bold] step 30")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    last = shown[shown.rindex("reward ") :]
    steps = [int(line.split()[0]) for line in last.splitlines() if re.match(r"\s*\d+\s", line)]
    assert steps == list(range(19, 31))
    assert "0.300 +0.01" in last
    assert "3.1k" in last
    assert "30/40 steps, about 0 s left; rollout 53% train 42%" in last
    assert "[bold]saved[/bold] step 30" in shown


def test_the_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with make_progress(2, stream=stream) as progress:
        progress.step(1, STEP)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= 40


def test_shares_of_time() -> None:
    assert split({}) == ""
    assert (
        split({"time/step": 2.0, "time/rollout": 1.0, "time/train": 0.9, "time/sync": 0.01})
        == "rollout 50% train 45%"
    )


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (0, "0"), (950, "950"), (3100, "3.1k"), (2.44e6, "2.4M")]
)
def test_rate(value: float | None, shown: str) -> None:
    assert rate(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (45, "45 s"), (60, "1 min"), (725, "12 min"), (3600, "1 h 00 min"), (11100, "3 h 05 min")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_change() -> None:
    assert change(None, 1.0) == ""
    assert change(1.0, None) == ""
    assert change(0.5, 0.25) == "+0.25"
