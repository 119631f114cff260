"""A process that scores completions and that its parent may kill at any time.

    python -m grpo_core.data.reward_worker

In: one `Setup`, then lists of `Item`. Out: one `Ready`, then a `Result` for each item in the order in which
they are done. The process ends when its input does. It imports no torch unless the user's function does.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import pickle
import sys
import threading
import time
from typing import Any, BinaryIO

from .reward_protocol import (
    GroundTruthError,
    Item,
    Ready,
    Result,
    RewardFn,
    Setup,
    as_number,
    attempt,
    check_call,
    is_async,
    load_function,
    receive,
    send,
    told,
)
from .rewards import WARM


def main() -> int:
    """Serve until the input ends."""
    # The function may print: what it prints must not mix with the messages.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        setup: Setup = receive(requests)
        function, error = attempt(lambda: _prepare(setup))
        if error is not None:
            send(replies, Ready(error=told(error)))
            return 1
        send(replies, Ready(concurrent=is_async(function)))
        while True:
            _serve(function, setup, receive(requests), replies)
    except (EOFError, BrokenPipeError):
        return 0


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _prepare(setup: Setup) -> RewardFn:
    sys.path[:] = setup.path
    function: RewardFn = load_function(setup.target) if setup.target else pickle.loads(setup.pickled)
    check_call(function, setup.options)
    if function in WARM:
        WARM[function]()
    if setup.memory_bytes:
        _limit_memory(setup.memory_bytes)
    return function


def _limit_memory(size: int) -> None:
    used = _address_space()
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        if used:
            resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))


def _address_space() -> int:
    """Bytes mapped by this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _limit_cpu(seconds: float) -> None:
    """Have the system end the process soon after its time limit, should nobody be left to kill it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds + 5), hard))


def _serve(function: RewardFn, setup: Setup, items: list[Item], replies: BinaryIO) -> None:
    if is_async(function):
        asyncio.run(_side_by_side(function, setup, items, replies))
        return
    for item in items:
        if setup.hostile:
            _limit_cpu(setup.timeout)
        send(replies, _score(function, setup, item))


def _score(function: RewardFn, setup: Setup, item: Item) -> Result:
    value, error = attempt(lambda: _number_from(function(item.text, item.sample, **setup.options)))
    if error is None:
        return Result(number=item.number, value=value)
    excused = setup.hostile and not isinstance(error, GroundTruthError)
    return Result(number=item.number, error=told(error), excused=excused)


def _number_from(value: Any) -> float:
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    return as_number(value)


async def _awaited(value: Any) -> Any:
    return await value


async def _side_by_side(function: RewardFn, setup: Setup, items: list[Item], replies: BinaryIO) -> None:
    async def one(item: Item) -> float:
        coroutine = function(item.text, item.sample, **setup.options)
        return as_number(await asyncio.wait_for(coroutine, timeout=setup.timeout))

    scores = await asyncio.gather(*(one(item) for item in items), return_exceptions=True)
    for item, score in zip(items, scores, strict=True):
        if isinstance(score, TimeoutError):
            send(replies, Result(number=item.number, error=f"it was not done after {setup.timeout:g} s"))
        elif isinstance(score, BaseException):
            send(replies, Result(number=item.number, error=told(score)))
        else:
            send(replies, Result(number=item.number, value=score))


if __name__ == "__main__":
    sys.exit(main())
