"""Comparing what a plugin brings with the Protocol of its op."""

from __future__ import annotations

import functools
from typing import Any, Protocol

import pytest

from grpo_core.signatures import mismatch


class Call(Protocol):
    def __call__(self, x: Any, w: Any, *, eps: float, residual: Any) -> Any: ...


class Machine(Protocol):
    def __init__(self, size: int) -> None: ...

    def __call__(self, x: Any) -> Any: ...

    def run(self, x: Any, *, fast: bool) -> Any: ...


class Bare(Protocol):
    def stop(self) -> None: ...


def good(x: Any, w: Any, *, eps: float, residual: Any) -> Any: ...
def reordered_keywords(x: Any, w: Any, *, residual: Any, eps: float) -> Any: ...
def with_default(x: Any, w: Any, *, eps: float = 1e-6, residual: Any, block: int = 64) -> Any: ...
def renamed(x: Any, weight: Any, *, eps: float, residual: Any) -> Any: ...
def swapped(w: Any, x: Any, *, eps: float, residual: Any) -> Any: ...
def lacking(x: Any, w: Any, *, eps: float) -> Any: ...
def short(x: Any) -> Any: ...
def greedy(x: Any, w: Any, *, eps: float, residual: Any, block: int) -> Any: ...
def loose(x: Any, w: Any, eps: float, residual: Any) -> Any: ...
def vague(*args: Any, **kwargs: Any) -> Any: ...
def keywords(x: Any, w: Any, **kwargs: Any) -> Any: ...
def closed(x: Any, w: Any, /, *, eps: float, residual: Any) -> Any: ...


@functools.wraps(good)
def wrapped(*args: Any, **kwargs: Any) -> Any: ...


class Callable_:
    def __call__(self, x: Any, w: Any, *, eps: float, residual: Any) -> Any: ...


@pytest.mark.parametrize("served", [good, reordered_keywords, with_default, wrapped, Callable_()])
def test_a_function_that_fits(served: Any) -> None:
    assert mismatch(served, Call, "function") is None


@pytest.mark.parametrize(
    ("served", "problem"),
    [
        (renamed, "positional parameter 2 is 'weight', not 'w'"),
        (swapped, "positional parameter 1 is 'w', not 'x'"),
        (lacking, "parameter 'residual' is missing"),
        (short, "positional parameter 2 'w' is missing"),
        (greedy, "it also asks for block"),
        (loose, "'eps' is positional, not keyword-only"),
        (vague, "positional parameter 1 is 'args', not 'x'"),
        (keywords, "parameter 'eps' is missing"),
        (closed, "'x' is positional-only, not positional"),
        (3, "3 is not callable"),
        (dict.fromkeys, "positional parameter 1 is 'iterable', not 'x'"),
        (type, "its signature cannot be read"),
    ],
)
def test_a_function_that_does_not_fit_says_how(served: Any, problem: str) -> None:
    assert problem in str(mismatch(served, Call, "function"))


def test_both_signatures_are_shown() -> None:
    assert str(mismatch(lacking, Call, "function")).endswith(
        "; wanted (x, w, *, eps, residual), found (x, w, *, eps)"
    )


def test_an_older_offer_may_lack_an_added_argument() -> None:
    assert mismatch(lacking, Call, "function", leave_out={"residual"}) is None


class Right:
    def __init__(self, size: int, *, spare: int = 0) -> None: ...

    def __call__(self, x: Any) -> Any: ...

    def run(self, x: Any, *, fast: bool) -> Any: ...


class Inheriting(Right):
    pass


class Static(Right):
    @staticmethod
    def run(x: Any, *, fast: bool) -> Any: ...


class NoCall:
    def __init__(self, size: int) -> None: ...

    def run(self, x: Any, *, fast: bool) -> Any: ...


class OtherInit(Right):
    def __init__(self, length: int) -> None: ...


class NoInit(Right):
    __init__ = object.__init__  # type: ignore[assignment]


class OtherRun(Right):
    def run(self, x: Any) -> Any: ...


class Attribute(Right):
    run = None  # type: ignore[assignment]


@pytest.mark.parametrize("served", [Right, Inheriting, Static])
def test_a_class_that_fits(served: Any) -> None:
    assert mismatch(served, Machine, "class") is None


@pytest.mark.parametrize(
    ("served", "problem"),
    [
        (NoCall, "it has no method __call__"),
        (OtherInit, "__init__: positional parameter 1 is 'length', not 'size'"),
        (NoInit, "__init__: positional parameter 1"),
        (OtherRun, "run: parameter 'fast' is missing"),
        (Attribute, "it has no method run"),
        (good, "is not a class"),
        (Right(1), "is not a class"),
    ],
)
def test_a_class_that_does_not_fit_says_how(served: Any, problem: str) -> None:
    assert problem in str(mismatch(served, Machine, "class"))


def test_a_class_of_a_protocol_without_init_is_constructed_without_arguments() -> None:
    class Free:
        def stop(self) -> None: ...

    class Needy(Free):
        def __init__(self, host: str) -> None: ...

    assert mismatch(Free, Bare, "class") is None
    assert (
        mismatch(Needy, Bare, "class") == "its constructor asks for host; it is constructed without arguments"
    )
