"""Limits of time on machines that do other things as well: what counts is time in which this process ran."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

TICK = 0.25
"""Seconds of one turn of waiting. A turn that took longer was held up by the machine, and counts no more."""


@dataclass(slots=True, kw_only=True)
class Patience:
    """Waits for other processes up to a limit that does not run while the machine is away.

    Where this process, which only sleeps, is woken late, those that it waits for were held up as well: by
    other programs, or because all of them were stopped. Nothing that they do can hold it up, so that the
    limit always comes.
    """

    limit: float
    """Seconds."""
    spent: float = 0.0
    """Seconds that counted."""
    away: float = 0.0
    """Seconds by which turns took too long."""

    def wait(self, links: Sequence[Connection]) -> list[Connection]:
        """Links that can be read or have ended; none when the limit is over."""
        while True:
            turn = max(0.0, min(TICK, self.limit - self.spent))
            began = time.monotonic()
            ready = wait(links, turn)
            took = time.monotonic() - began
            self.spent += min(took, turn)
            self.away += max(0.0, took - turn)
            if ready or self.spent >= self.limit:
                return [link for link in links if link in ready]
