"""One process of a group: it opens the device, makes the collectives and answers what it is asked."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import torch

from grpo_core.backend import import_pointer
from grpo_core.devices.pick import pick_device
from grpo_core.ops.collectives import Collectives, Group
from grpo_core.plugins import Raised, attempt, load

LONGEST = 600
"""Seconds after which a question ends its process, should nobody be left to do so."""

WHERE = signal.SIGUSR1
"""Asks a process where it is."""


@dataclass(slots=True, kw_only=True)
class Seat:
    """What a question finds in a rank's process."""

    make: Callable[[], Collectives]
    device: torch.device
    dtypes: tuple[str, ...]
    """Floating-point dtypes that the device computes in."""
    collectives: Any = None
    """`Collectives`, once joined."""
    group: Any = None
    """`Group` of the whole world, once joined."""
    rank: int = -1
    world: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back from one rank."""

    rank: int
    status: Literal["value", "raised", "died", "silent"]
    value: Any = None
    text: str = ""
    """The error, the way it died, or how long it has been silent."""
    kinds: tuple[str, ...] = ()
    """Names of the classes of the error, the nearest first."""
    away: float = 0.0
    """Seconds that the machine did other things while the suite waited for the answers."""


def join(seat: Seat, *, rank: int, world: int, store: str, timeout: float) -> None:
    """Join a world and make its group."""
    seat.collectives = seat.make()
    seat.collectives.init(rank=rank, world=world, store=store, timeout=timeout)
    seat.rank, seat.world = rank, world
    group: Group = seat.collectives.group(list(range(world)))
    seat.group = group


def serve(link: Connection, device: str, pointer: str, index: int, log: Path) -> None:
    """The process: answer ("module:function", arguments) until the other side closes.

    What it prints, and where it is when it gets `WHERE`, is appended to `log`.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST)
    written = log.open("ab", buffering=0)
    os.dup2(written.fileno(), 1)
    os.dup2(written.fileno(), 2)
    faulthandler.register(WHERE, file=written, all_threads=False)
    threading.Thread(target=_end_with_the_suite, daemon=True).start()
    # Several ranks share the host's cores.
    torch.set_num_threads(1)
    # The suite closes its end of the link when it has heard enough.
    with contextlib.suppress(EOFError, ConnectionError):
        _serve(link, device, pointer, index)


def _end_with_the_suite() -> None:
    """A rank that waits for a peer does not see that nobody waits for it any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _serve(link: Connection, device: str, pointer: str, index: int) -> None:
    seat = attempt(lambda: take_seat(device, pointer, index))
    _send(link, seat if isinstance(seat, Raised) else None)
    while not isinstance(seat, Raised):
        run, args = link.recv()
        signal.alarm(LONGEST)
        _send(link, attempt(lambda: import_pointer(run)(seat, **args)))  # noqa: B023


def take_seat(device: str, pointer: str, index: int) -> Seat:
    """Open the device and import the collectives behind a pointer."""
    found, info = pick_device(device, load())
    opened = found.open(index)
    order = ("bfloat16", "float16", "float32", "float64")
    dtypes = tuple(name for name in order if name in info.dtypes)
    return Seat(make=import_pointer(pointer), device=opened, dtypes=dtypes)


def _send(link: Connection, said: Any) -> None:
    """Plain pickles: those of multiprocessing would pass tensors through shared memory."""
    if isinstance(said, Raised):
        kinds = tuple(kind.__name__ for kind in type(said.error).__mro__)
        link.send_bytes(pickle.dumps(("raised", str(said), kinds)))
    else:
        link.send_bytes(pickle.dumps(("value", said, ())))
