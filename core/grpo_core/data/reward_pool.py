"""Worker processes of one reward, killed and replaced when they run over their time."""

from __future__ import annotations

import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RewardError
from ..types import Sample
from .reward_protocol import Item, Ready, Result, Setup, receive, send

START_SECONDS = 180.0
"""For the imports of a worker, which do not count as the time of a completion."""
ASYNC_AT_ONCE = 64
"""Completions that an async function gets side by side."""


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float
    ready: bool = False
    concurrent: bool = False
    items: dict[int, Item] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        return self.ready and not self.items


class Pool:
    """Up to `size` processes that serve the reward `label`; the first starts at once, in the background."""

    def __init__(self, label: str, setup: Setup, size: int) -> None:
        self.label = label
        self.setup = setup
        self.size = size
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._spawn()

    def check(self) -> None:
        """Wait until a worker is ready. Raises `RewardError` when the function cannot be loaded."""
        while not any(worker.ready for worker in self._workers):
            self._turn({}, deque())

    def score(self, pairs: Sequence[tuple[str, Sample]]) -> list[Result]:
        """A result for each pair, in order. Stops early at an error that is not the completion's fault."""
        waiting = deque(Item(number=n, text=text, sample=s) for n, (text, s) in enumerate(pairs))
        results: dict[int, Result] = {}
        while len(self._workers) < min(self.size, len(pairs)):
            self._spawn()
        while len(results) < len(pairs):
            for worker in [worker for worker in self._workers if worker.idle]:
                self._give(worker, waiting)
            self._turn(results, waiting)
            if any(result.error and not result.excused for result in results.values()):
                for worker in [worker for worker in self._workers if worker.items]:
                    self._replace(worker)
                break
        return [results[number] for number in sorted(results)]

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._workers):
            self._drop(worker)
        self._selector.close()

    def _spawn(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_core.data.reward_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Ctrl-C is for the run, which then ends its workers.
            start_new_session=True,
        )
        worker = _Worker(process=process, deadline=time.monotonic() + START_SECONDS)
        self._workers.append(worker)
        self._selector.register(_pipe(process.stdout), selectors.EVENT_READ, worker)
        try:
            send(_pipe(process.stdin), self.setup)
        except OSError:
            return  # it died already: its closed output tells, in _turn

    def _give(self, worker: _Worker, waiting: deque[Item]) -> None:
        count = min(len(waiting), ASYNC_AT_ONCE if worker.concurrent else 1)
        if not count:
            return
        items = [waiting.popleft() for _ in range(count)]
        worker.items = {item.number: item for item in items}
        # An async function has its own clock; this one ends a worker that blocks.
        worker.deadline = time.monotonic() + self.setup.timeout * (1.5 if worker.concurrent else 1)
        try:
            send(_pipe(worker.process.stdin), items)
        except OSError:
            return  # as in _spawn

    def _turn(self, results: dict[int, Result], waiting: deque[Item]) -> None:
        """Wait for something to happen and deal with it."""
        now = time.monotonic()
        busy = [worker for worker in self._workers if worker.items or not worker.ready]
        pause = max(0.0, min((worker.deadline for worker in busy), default=now) - now)
        for key, _ in self._selector.select(pause):
            self._hear(key.data, results, waiting)
        now = time.monotonic()
        for worker in [w for w in self._workers if (w.items or not w.ready) and w.deadline <= now]:
            if not worker.ready:
                raise self._no_start(f"it was not loaded after {START_SECONDS:g} s")
            self._lost(worker, f"it was not done after {self.setup.timeout:g} s", results, waiting)

    def _hear(self, worker: _Worker, results: dict[int, Result], waiting: deque[Item]) -> None:
        try:
            message = receive(_pipe(worker.process.stdout))
        except EOFError:
            code = worker.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            if not worker.ready:
                raise self._no_start(f"its process ended with {how}") from None
            self._lost(worker, f"its process ended with {how}", results, waiting)
            return
        if isinstance(message, Ready):
            if message.error:
                raise self._no_start(message.error)
            worker.ready, worker.concurrent = True, message.concurrent
        else:
            results[message.number] = message
            worker.items.pop(message.number, None)

    def _lost(self, worker: _Worker, why: str, results: dict[int, Result], waiting: deque[Item]) -> None:
        """Blame the first item that the worker held, give the others back, replace the worker."""
        items = list(worker.items.values())
        if items:
            number = items[0].number
            results[number] = Result(number=number, error=why, excused=self.setup.hostile)
            waiting.extendleft(reversed(items[1:]))
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        self._drop(worker)
        self._spawn()

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._selector.unregister(_pipe(worker.process.stdout))
        worker.process.kill()
        worker.process.wait()
        for stream in (worker.process.stdin, worker.process.stdout):
            _pipe(stream).close()

    def _no_start(self, why: str) -> RewardError:
        self.close()
        return RewardError(
            f"reward {self.label!r} cannot be used",
            why=why,
            fix="mend the function or its options; it is called as function(text, sample, **options)",
        )


def _pipe(stream: Any) -> Any:
    return stream
