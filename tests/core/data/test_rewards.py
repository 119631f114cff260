"""The built-in reward functions."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_core.data.reward_protocol import GroundTruthError
from grpo_core.data.rewards import exact, last_number, math, number, regex
from grpo_core.types import Sample


def sample(answer: str | None) -> Sample:
    return Sample(id="s", answer=answer)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("even", "even", 1),
        (" Even.\n", "even", 1),
        ("EVEN", "even", 1),
        ("odd", "even", 0),
        ("1,  2,\n3", "1, 2, 3", 1),
        ("the answer is even", "even", 0),
        ("\uff11\uff12", "12", 1),
        ("", "even", 0),
        ("12.", "12", 1),
        ("Stra\u00dfe", "STRASSE", 1),
    ],
)
def test_exact(text: str, answer: str, score: float) -> None:
    assert exact(text, sample(answer)) == score


def test_exact_with_case() -> None:
    assert exact("Even", sample("even"), case=True) == 0
    assert exact("even ", sample("even"), case=True) == 1


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("12", 12),
        ("it is 12.", 12),
        ("5 + 7 = 12", 12),
        ("-3", -3),
        ("is -3.5!", Fraction(-7, 2)),
        ("7-3", 3),
        ("7 - 3", 3),
        ("= -5", -5),
        ("(-5)", -5),
        ("\u22125", -5),
        ("x-5", 5),
        ("1,234", 1234),
        ("-1,234.50", Fraction(-2469, 2)),
        ("1,2,3", 3),
        ("-1,-2", -2),
        ("12,34", 34),
        ("4,", 4),
        ("$1,000,000", 1000000),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("1e3", 1000),
        ("2.5e-1", Fraction(1, 4)),
        ("5%", 5),
        ("\\boxed{42}", 42),
        ("#### 18", 18),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("-", None),
        ("1e99999", 99999),
        ("\u0661\u0662", None),
        ("9" * 500, None),
    ],
)
def test_last_number(text: str, last: Fraction | int | None) -> None:
    assert last_number(text) == last


@given(st.fractions(max_denominator=10**6), st.text(alphabet="abc ,:=$%?!()", max_size=10))
@settings(max_examples=200, deadline=None)
def test_number_finds_any_fraction_after_any_words(value: Fraction, words: str) -> None:
    assert last_number(f"17 {words} {value}") == value
    assert number(f"17 {words} is {value}", sample(str(value))) == 1.0
    assert number(f"17 {words} is {value + 1}", sample(str(value))) == 0.0


@given(st.integers(-(10**12), 10**12))
@settings(max_examples=100, deadline=None)
def test_number_reads_thousands(value: int) -> None:
    assert last_number(f"{value:,}") == value


@pytest.mark.parametrize("part", ["1,", "111,", "1/", "-", "1", ".", "1e", "1.", "1.1", "-1", ",", "1e9/"])
def test_number_takes_linear_time_on_hostile_text(part: str) -> None:
    start = time.process_time()
    last_number(part * (200_000 // len(part)))
    # Linear work on this takes some 50 ms; quadratic work would take minutes.
    assert time.process_time() - start < 5


def test_number_needs_a_number_in_the_answer() -> None:
    with pytest.raises(GroundTruthError, match="has no number"):
        number("12", sample("even"))
    with pytest.raises(GroundTruthError, match="no answer"):
        number("12", sample(None))


def test_regex() -> None:
    assert regex("<think>a\nb</think> 3", sample(None), pattern=r"(?s)^<think>.*</think>") == 1
    assert regex("x <think>a</think>", sample(None), pattern=r"^<think>") == 0
    assert regex("12", sample(None), pattern="1", full=True) == 0
    assert regex("12", sample(None), pattern="[0-9]+", full=True) == 1


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The answer is $\\frac{1}{2}$.", "0.5", 1),
        ("\\boxed{x^2 - 1}", "(x-1)(x+1)", 1),
        ("so $x = 3$", "3", 1),
        ("\\boxed{4}", "3", 0),
        ("nothing", "3", 0),
        ("", "3", 0),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", 1),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1),
        ("3", "\\boxed{3}", 1),
    ],
)
def test_math(text: str, answer: str, score: float) -> None:
    assert math(text, sample(answer)) == score


def test_math_tells_an_answer_that_is_no_expression() -> None:
    with pytest.raises(GroundTruthError, match="cannot read the answer"):
        math("3", sample(""))
