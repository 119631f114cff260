"""The processes of a group, seen from the suite: started, asked, heard within a time, and ended."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo_core.errors import GrpoError

from ..patience import Patience
from .rank import WHERE, Answer, serve

START = 90.0
"""Seconds for processes to start and open the device."""
GRACE = 3.0
"""Seconds that the others are given when one rank has failed: they may be waiting for it in vain."""

FRAMES = 4
"""Calls that are told of a process that hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """Processes that can be asked one question at a time each. Nothing here ever waits without a limit."""

    processes: tuple[Any, ...]
    links: tuple[Connection, ...]
    folder: Path
    """Of this crew alone; holds the stores at which it meets."""

    def ask(self, run: str, args: Mapping[str, Any], *, limit: float) -> list[Answer]:
        """The same question to every rank."""
        return self.ask_each(run, [args] * len(self.links), limit=limit)

    def ask_each(self, run: str, args: Sequence[Mapping[str, Any]], *, limit: float) -> list[Answer]:
        """A question to every rank with arguments of its own."""
        self.tell(run, args)
        return self.hear(limit=limit)

    def tell(self, run: str, args: Sequence[Mapping[str, Any]]) -> None:
        """Ask, and do not wait."""
        for link, mine in zip(self.links, args, strict=True):
            try:
                link.send((run, dict(mine)))
            except (BrokenPipeError, ConnectionResetError):
                continue  # its end is heard of

    def hear(
        self, ranks: Iterable[int] | None = None, *, limit: float, grace: float | None = GRACE
    ) -> list[Answer]:
        """What `ranks` (all) answer within `limit` seconds; those that do not are silent.

        After a first failure the others have `grace` seconds left, or what there is of the limit for None.
        Time in which the machine does other things is none of them.
        """
        waiting = set(range(len(self.links)) if ranks is None else ranks)
        answers: dict[int, Answer] = {}
        patience = Patience(limit=limit)
        while waiting and (ready := patience.wait([self.links[rank] for rank in waiting])):
            for rank in [rank for rank in waiting if self.links[rank] in ready]:
                answers[rank] = self._hear_one(rank)
                waiting.remove(rank)
                if grace is not None and answers[rank].status != "value":
                    patience.limit = min(patience.limit, patience.spent + grace)
        for rank in waiting:
            said = f"no answer after {patience.spent:.1f} s, in {self._where(rank)}"
            answers[rank] = Answer(rank=rank, status="silent", text=said)
        return [replace(answers[rank], away=patience.away) for rank in sorted(answers)]

    def _hear_one(self, rank: int) -> Answer:
        try:
            status, said, kinds = pickle.loads(self.links[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            return Answer(rank=rank, status="died", text=self._death(rank))
        if status == "raised":
            return Answer(rank=rank, status="raised", text=str(said), kinds=kinds)
        return Answer(rank=rank, status="value", value=said)

    def _death(self, rank: int) -> str:
        process = self.processes[rank]
        process.join(5.0)
        code = process.exitcode
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        last = [line for line in self._log(rank).splitlines() if line.strip()][-1:]
        return f"its process ended by {how}" + "".join(f" ({line.strip()[:200]})" for line in last)

    def _where(self, rank: int) -> str:
        """The innermost calls of a process that does not answer."""
        process = self.processes[rank]
        if not process.is_alive():
            return "a process that has ended"
        os.kill(process.pid, WHERE)
        time.sleep(0.3)
        trace = self._log(rank).rpartition("most recent call first")[2]
        frames = [_short(line.strip()) for line in trace.splitlines() if line.strip().startswith("File ")]
        return " < ".join(frames[:FRAMES]) or "unknown code"

    def _log(self, rank: int) -> str:
        path = log_of(self.folder, rank)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End all processes, by force, and take the stores away."""
        for link in self.links:
            link.close()
        for process in self.processes:
            process.join(0.2)
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def store(self, kind: str, name: str = "store") -> str:
        """An address at which a world of this crew can meet once: "tcp" or "file"."""
        if kind == "file":
            return f"file://{self.folder / name}"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            return f"tcp://127.0.0.1:{taken.getsockname()[1]}"


def start(device: str, pointer: str, indices: Sequence[int]) -> Crew:
    """A process for each device index, each with the device open and the collectives imported.

    Raises `GrpoError` when one of them does not get that far. The processes are forked from a server that
    has imported torch and no plugin.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "grpo_core.backend", "grpo_conformance.comm.rank"])
    folder = Path(tempfile.mkdtemp(prefix="grpo-conformance-"))
    # Of a crew that is kept until this process ends, after its own processes have.
    util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-1)
    processes, links = [], []
    for rank, index in enumerate(indices):
        ours, theirs = context.Pipe()
        words = (theirs, device, pointer, index, log_of(folder, rank))
        process = context.Process(target=serve, args=words, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        links.append(ours)
    crew = Crew(processes=tuple(processes), links=tuple(links), folder=folder)
    bad = [answer for answer in crew.hear(limit=START) if answer.status != "value"]
    if bad:
        crew.close()
        raise GrpoError(
            f"a process for {pointer} cannot be started",
            why=f"rank {bad[0].rank}: {bad[0].text}",
            fix="import the pointer and open the device in a process of its own",
        )
    return crew


def _short(frame: str) -> str:
    """A line of a traceback whose file is named from where Python finds it, not from the machine's root."""
    for place in sorted((place for place in sys.path if place), key=len, reverse=True):
        frame = frame.replace(f'"{place.rstrip(os.sep)}{os.sep}', '"')
    return frame


def log_of(folder: Path, rank: int) -> Path:
    """What a rank prints."""
    return folder / f"rank{rank}.log"
