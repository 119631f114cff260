"""What a run and its reward workers say to each other: pickled messages with their length before them."""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..types import Sample

RewardFn = Callable[..., Any]
HEADER = struct.Struct("<Q")


class GroundTruthError(ValueError):
    """The sample, not the completion, is why a reward cannot be given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The one reward that a worker serves."""

    target: str
    """"package.module:attribute", or empty when `pickled` holds the function."""
    pickled: bytes
    options: Mapping[str, Any]
    timeout: float
    """Seconds for one item."""
    path: tuple[str, ...]
    """The parent's `sys.path`, so that the same modules are found."""
    hostile: bool
    """The function evaluates what a model wrote: whatever goes wrong then is the completion's fault."""
    memory_bytes: int
    """Address space that a hostile function may add; 0 is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """First answer of a worker."""

    error: str = ""
    concurrent: bool = False
    """The function is async: its items run side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One completion to score."""

    number: int
    text: str
    sample: Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The score of one item, or why there is none."""

    number: int
    value: float = 0.0
    error: str = ""
    excused: bool = False
    """The error is the completion's own fault: it scores 0 and the run goes on."""


def send(stream: BinaryIO, message: object) -> None:
    """Write one message. Raises `OSError` when the other side is gone."""
    data = pickle.dumps(message)
    data = HEADER.pack(len(data)) + data
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read one message. Raises `EOFError` at the end of the stream."""
    return pickle.loads(_exactly(stream, HEADER.unpack(_exactly(stream, HEADER.size))[0]))


def _exactly(stream: BinaryIO, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = stream.read(count - len(data))
        if not part:
            raise EOFError("the other side is gone")
        data += part
    return bytes(data)


def load_function(target: str) -> RewardFn:
    """Import "package.module:attribute". Raises what the import raises, or `TypeError`."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def check_call(function: RewardFn, options: Mapping[str, Any]) -> None:
    """Raises `TypeError` when the function cannot be called as `(text, sample, **options)`."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # written in C, without a signature: the first call will tell
    signature.bind("", None, **options)


def is_async(function: RewardFn) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def as_number(value: object) -> float:
    """A reward as a float. Raises `ValueError` for anything that is not a finite number."""
    # The plain case first: the abstract type is slow to ask.
    if type(value) is not float and not isinstance(value, numbers.Real):
        raise ValueError(f"it returned {str(value)[:60]!r} ({type(value).__name__}), not a number")
    if not math.isfinite(value):
        raise ValueError(f"it returned {float(value)}, not a finite number")
    return float(value)


def attempt(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """The result of a user's code, or what it raised."""
    try:
        return call(), None
    # Somebody else's code may raise anything; it is told as that reward's error, never passed over.
    except Exception as error:  # noqa: BLE001
        return None, error


def told(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}" if str(error) else type(error).__name__
