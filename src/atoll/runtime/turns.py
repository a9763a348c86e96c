"""Whose turn it is to compute, where several runs share one site: no run starves another.

At most so many handlers compute at the same time. Of the runs that wait, the one goes next that has had the least
computing time here so far: a short run gets between the rounds of a long one, whoever came first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

PING_S = 1.0
"""How often whoever waits tells that it is still there."""


class Turns:
    """One per site. Safe for threads."""

    def __init__(self, at_once: int | None = None) -> None:
        """at_once: how many compute at the same time (default: as many as there are cores)."""
        self._free = at_once or os.cpu_count() or 1
        self._changed = threading.Condition()
        self._waiting: dict[int, str] = {}
        self._tickets = count()
        self._spent_s: dict[str, float] = {}

    @contextmanager
    def taken(self, run: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Within it, it is the turn of *run*. waiting: called about every second until then; what it raises ends it."""
        with self._changed:
            ticket = next(self._tickets)
            self._waiting[ticket] = run
        try:
            self._wait(ticket, waiting)
        except BaseException:
            with self._changed:
                del self._waiting[ticket]
                self._changed.notify_all()
            raise
        began = time.monotonic()
        try:
            yield
        finally:
            with self._changed:
                self._spent_s[run] = self._spent_s.get(run, 0.0) + time.monotonic() - began
                self._free += 1
                self._changed.notify_all()

    def _wait(self, ticket: int, waiting: Callable[[], None]) -> None:
        told = time.monotonic()
        while True:
            with self._changed:
                if self._free and self._next() == ticket:
                    del self._waiting[ticket]
                    self._free -= 1
                    self._changed.notify_all()  # there may be room for another
                    return
                self._changed.wait(PING_S)
            if time.monotonic() - told >= PING_S:
                waiting()
                told = time.monotonic()

    def _next(self) -> int:
        return min(self._waiting, key=lambda ticket: (self._spent_s.get(self._waiting[ticket], 0.0), ticket))

    def spent_s(self, run: str) -> float:
        """Computing time that a run has had."""
        with self._changed:
            return self._spent_s.get(run, 0.0)

    def forget(self, run: str) -> None:
        """A run has ended."""
        with self._changed:
            self._spent_s.pop(run, None)
