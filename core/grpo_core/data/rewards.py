"""Built-in rewards: plain functions `(text, sample, **options) -> float`.

Nothing here imports torch: the worker processes that score import this file.
"""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction

from ..types import Sample
from .gym import gym_score
from .reward_protocol import GroundTruthError, RewardFn

# A minus belongs to the number unless a digit, letter or bracket stands before it ("7-3" ends in 3).
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z_)\].])-)?"
    r"(?:(?P<whole>[0-9][0-9,]*)(?P<part>(?<=[0-9])\.[0-9]+)?|(?<![0-9])(?P<only>\.[0-9]+))"
    r"(?P<exponent>(?<=[0-9])[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?"
    r"(?P<under>(?<=[0-9])/[0-9]+(?![0-9/]))?"
)
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
MAX_DIGITS = 400
"""Longer "numbers" are degenerate output; comparing them would only cost time."""


def answer_of(sample: Sample) -> str:
    """The ground truth. Raises `GroundTruthError` when the sample has none."""
    if sample.answer is None:
        raise GroundTruthError("the sample has no answer to compare with")
    return sample.answer


def exact(text: str, sample: Sample, *, case: bool = False) -> float:
    """1 when the completion is the answer, after Unicode NFKC, with spaces squeezed, without outer
    whitespace and a final full stop, and (unless `case`) without case; else 0."""
    return float(_plain(text, case) == _plain(answer_of(sample), case))


def number(text: str, sample: Sample) -> float:
    """1 when the last number in the completion equals the last number in the answer, else 0.

    Reads 1,234 and 2.50 and 1e3 and 3/4. Raises `GroundTruthError` for an answer without a number.
    """
    truth = _true_number(answer_of(sample))
    if truth is None:
        raise GroundTruthError(f"the answer {sample.answer!r} has no number; use the reward exact or math")
    return float(last_number(text) == truth)


def last_number(text: str) -> Fraction | None:
    """The last number written in `text`, exactly, or None."""
    # \u2212 is the minus sign of typeset text.
    found = None
    for match in _NUMBER.finditer(text.replace("\u2212", "-")):
        found = match
    return _value(*found.groups()) if found is not None and len(found[0]) <= MAX_DIGITS else None


@functools.lru_cache(maxsize=4096)
def _true_number(answer: str) -> Fraction | None:
    """`last_number` of a ground truth, which all completions of a group are compared with."""
    return last_number(answer)


@functools.lru_cache(maxsize=4096)
def _value(
    sign: str | None, whole: str | None, part: str | None, only: str | None, exponent: str | None,
    under: str | None,
) -> Fraction | None:  # fmt: skip
    """The groups of `_NUMBER` as a number; cached, because completions of a group repeat each other."""
    sign, whole = sign or "", (whole or "0").rstrip(",")
    if not _THOUSANDS.fullmatch(whole) and "," in whole:
        # "1,2,3" is a list: its last entry counts, which no sign stands before.
        sign, whole = "", whole.rpartition(",")[2]
    over = Fraction(sign + whole.replace(",", "") + (part or only or "") + (exponent or ""))
    below = int(under[1:]) if under else 1
    return over / below if below else None


def regex(text: str, sample: Sample, *, pattern: str, full: bool = False) -> float:
    """1 when `pattern` is found in the completion (with `full`: matches all of it), else 0.

    Flags go into the pattern: `(?s)` lets a dot match line ends.
    """
    compiled = re.compile(pattern)
    return float((compiled.fullmatch(text) if full else compiled.search(text)) is not None)


def math(text: str, sample: Sample) -> float:
    """1 when math-verify (Kydlicek 2025) finds the completion equivalent to the answer, else 0.

    Reads LaTeX and plain expressions, the last \\boxed{} first. It may take for ever and all memory on
    output such as 9!!!!!!: run it in a process that can be killed. Raises `GroundTruthError` when the answer
    itself is no expression.
    """
    from math_verify import parse, verify

    truth = answer_of(sample)
    wrapped = truth if "$" in truth or "\\boxed" in truth else f"${truth}$"
    gold = parse(wrapped, parsing_timeout=None) or parse(truth, parsing_timeout=None)
    if not gold:
        raise GroundTruthError(f"math-verify cannot read the answer {truth!r}; use the reward exact")
    return float(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))


def warm_math() -> None:
    """Import and first use, which are slow, so that they do not count as the first completion's time."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    math("1", Sample(id="warm", answer="1"))


def warm_gym() -> None:
    """Import of all tasks."""
    import reasoning_gym  # noqa: F401


def _plain(text: str, case: bool) -> str:
    squeezed = " ".join(unicodedata.normalize("NFKC", text).split()).removesuffix(".").rstrip()
    return squeezed if case else squeezed.casefold()


QUICK = frozenset({exact, number})
"""Called directly: their time is bounded by the length of the completion."""
HOSTILE = frozenset({math, gym_score})
"""Evaluate what the model wrote: running out of time or memory is the completion's fault and scores 0."""
WARM: Mapping[RewardFn, Callable[[], None]] = {math: warm_math, gym_score: warm_gym}
PACKAGES: Mapping[RewardFn, tuple[str, str]] = {
    math: ("math_verify", 'pip install "grpo-core[math]"'),
    gym_score: ("reasoning_gym", 'pip install "grpo-core[quickstart]"'),
}
