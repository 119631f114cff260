"""Questions about peers that die, leave, fall silent or never come, answered by the ranks that are left."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from grpo_core.errors import GrpoError
from grpo_core.plugins import Raised, attempt

from .rank import Seat, join

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "all_to_all",
               "gather_objects")  # fmt: skip
MANNERS = ("dead before", "dead meanwhile", "dead amid", "left", "silent")
"""What becomes of a peer: killed before the others call, while they wait for it, or in the middle of a
transfer; closed in good order; or alive and never calling."""
ATTEMPTS = 2
"""Calls of the collective, and after them of barriers, in which an error must come: a broadcast may be over
before anybody misses one of its receivers."""
PAUSE = 0.3
LARGE = 1 << 18
"""Elements that take a transfer some time."""


def meet(seat: Seat, *, rank: int, world: int, store: str, timeout: float) -> None:
    """Join, and see that everybody is there."""
    join(seat, rank=rank, world=world, store=store, timeout=timeout)
    seat.group.barrier()


def vanish(seat: Seat, manner: str, collective: str) -> str:
    """The peer's part."""
    if manner == "left":
        seat.collectives.close()
        return "left"
    if manner == "silent":
        time.sleep(3600)
    if manner == "dead amid":
        call = caller(seat, collective, LARGE)
        threading.Timer(PAUSE, _kill).start()
        while True:
            call()
    if manner == "dead meanwhile":
        time.sleep(PAUSE)
    _kill()
    return ""


def bereft(seat: Seat, *, manner: str, collective: str, victim: int) -> Any:
    """Call a collective without the victim until it is an error; how long each call took, and what came."""
    if seat.rank == victim:
        return vanish(seat, manner, collective)
    call = caller(seat, collective, LARGE if manner == "dead amid" else 8)
    if manner in ("dead before", "left"):
        time.sleep(PAUSE)
    seconds = []
    told: dict[str, Any] = {"raised": "", "sound": False}
    calls = itertools.repeat(call) if manner == "dead amid" else [call] * ATTEMPTS + [seat.group.barrier] * 2
    for call in calls:
        began = time.monotonic()
        said = attempt(call)
        seconds.append(time.monotonic() - began)
        if isinstance(said, Raised):
            sound = isinstance(said.error, GrpoError | RuntimeError)
            told = {"raised": str(said), "sound": sound}
            break
    began = time.monotonic()
    seat.collectives.close()
    return told | {"longest": max(seconds), "calls": len(seconds), "closing": time.monotonic() - began}


def caller(seat: Seat, collective: str, size: int) -> Callable[[], object]:
    """A call of a collective with inputs of some size, from rank 0 where somebody sends."""
    group, n = seat.group, seat.group.size
    x = torch.ones(n * size, device=seat.device)
    counts = [size] * n
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: group.all_reduce(x, op="max"),
        "all_gather": lambda: group.all_gather(x),
        "reduce_scatter": lambda: group.reduce_scatter(x, op="max"),
        "broadcast": lambda: group.broadcast(x, src=0),
        "barrier": group.barrier,
        "all_to_all": lambda: group.all_to_all(x, send_counts=counts, recv_counts=counts),
        "gather_objects": lambda: group.gather_objects("x" * size),
    }
    return calls[collective]


def forlorn(seat: Seat, *, rank: int, world: int, store: str, timeout: float) -> dict[str, Any]:
    """Join a world to which nobody else comes."""
    collectives = seat.make()
    began = time.monotonic()
    said = attempt(lambda: collectives.init(rank=rank, world=world, store=store, timeout=timeout))
    seconds = time.monotonic() - began
    raised = str(said) if isinstance(said, Raised) else ""
    sound = isinstance(said, Raised) and isinstance(said.error, GrpoError | RuntimeError)
    return {"raised": raised, "sound": sound, "longest": seconds}


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
