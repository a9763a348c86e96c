"""Virtual time: when each site's answer would arrive, by its link, its speed and when it is there.

A task takes as long as its way to the site (latency, and its bytes by the site's rate), the site's computing, which
begins when it has done what it was asked before, and the way back. Nothing goes on while a site is not there; when
that is longer than the plan's deadline, or the site vanishes in the midst of a task, the coordinator gives it up after
the deadline, and asks it again when it is back. Links carry as much as their rate says: there is no congestion but at
the coordinator's own link, where replies wait for each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.runtime.fleet import Fleet
from atoll.runtime.sizes import Load

Floats = NDArray[np.float64]
VANISHES = 11
"""The stream of randomness that says who vanishes, and when."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What becomes of one request to several sites, each [num_sites]. at: when its answer is there, or when the
    coordinator gives it up; lost: whether it does; compute_s: of it, computing."""

    at: Floats
    lost: NDArray[np.bool_]
    compute_s: Floats


class Clock(Protocol):
    """The time of a simulation."""

    virtual: bool
    """Is it other than that of the machine?"""

    @property
    def now(self) -> float:
        """Seconds since the run began."""

    def to(self, at_s: float) -> None:
        """It is *at_s* now, unless it is later already."""

    def ask(self, sites: Sequence[str], load: Load, compute_s: Floats) -> Sent:
        """Send a request of *load* now. compute_s: seconds on the machine that steps are measured on, [num_sites]."""

    def back_s(self, site: str) -> float:
        """From when on a site that was given up is there again; infinity: never."""


class Immediate:
    """No virtual time: every answer is there when it is computed, and the clock is the machine's."""

    virtual = False

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    def to(self, at_s: float) -> None:
        """Time goes by itself."""

    def ask(self, sites: Sequence[str], load: Load, compute_s: Floats) -> Sent:
        many = len(sites)
        return Sent(np.full(many, self.now), np.zeros(many, bool), np.zeros(many))

    def back_s(self, site: str) -> float:
        return math.inf


class Virtual:
    """The time of a fleet."""

    virtual = True

    def __init__(self, fleet: Fleet, deadline_s: float, step_s: float = 0.0) -> None:
        """deadline_s: after which silence a site is given up. step_s: of a local step on the measured machine."""
        self._fleet, self._deadline_s, self._now = fleet, deadline_s, 0.0
        self._place = {name: place for place, name in enumerate(fleet.names)}
        own = fleet["step"]
        speed = fleet["speed"]
        self._slower = np.where(np.isnan(own), 1.0, own / step_s if step_s > 0 else 1.0) / speed
        self._free, self._asks = np.zeros(len(fleet)), 0
        self._back = np.zeros(len(fleet))

    @property
    def now(self) -> float:
        return self._now

    def to(self, at_s: float) -> None:
        self._now = max(self._now, at_s)

    def back_s(self, site: str) -> float:
        place = self._place[site]
        return self._there(place, max(self._now, float(self._back[place])))

    def ask(self, sites: Sequence[str], load: Load, compute_s: Floats) -> Sent:
        fleet, now = self._fleet, self._now
        where = np.array([self._place[site] for site in sites], np.int64)
        latency = fleet["latency"][where]
        computing = compute_s * self._slower[where] + load.seconds
        arrives = now + latency + load.down_bytes / fleet["down"][where]
        if math.isfinite(fleet.hub_up):  # the coordinator's link is shared by all that it sends at once
            arrives = np.maximum(arrives, now + latency + len(where) * load.down_bytes / fleet.hub_up)
        begins = np.maximum(arrives, self._free[where])
        ends = begins + computing
        at = ends + latency + load.up_bytes / np.minimum(fleet["up"][where], fleet.hub_down)
        if load.trips > 1 and len(where):  # each exchange waits for the farthest
            at = at + (load.trips - 1) * 2 * float(latency.max())
        lost = np.zeros(len(where), bool)
        for one in np.flatnonzero(fleet.trace[where] >= 0):
            at[one], ends[one], lost[one] = self._by_trace(int(where[one]), load, float(computing[one]))
        self._vanish(where, at, ends, lost)
        self._free[where] = np.where(lost, self._free[where], ends)
        if math.isfinite(fleet.hub_down):
            at = self._queued(at, lost, load.up_bytes / fleet.hub_down)
        return Sent(at, lost, computing)

    def _queued(self, at: Floats, lost: NDArray[np.bool_], each_s: float) -> Floats:
        """Replies one after the other through the coordinator's link."""
        order, found = np.argsort(at, kind="stable"), at.copy()
        order = order[~lost[order]]
        places = np.arange(len(order))
        # the k-th is through when the last of those before it came that had to wait for none
        found[order] = np.maximum.accumulate(at[order] - places * each_s) + places * each_s
        return found

    def _vanish(self, where: NDArray[np.int64], at: Floats, ends: Floats, lost: NDArray[np.bool_]) -> None:
        """Some sites vanish in the midst: they are given up, or are back in time and go on."""
        fleet = self._fleet
        chance = fleet["dropout"][where]
        self._asks += 1
        if not chance.any():
            return
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((fleet.seed, self._asks, VANISHES))))
        drawn = random.random((len(fleet), 2))[where]
        gone = (drawn[:, 0] < chance) & ~lost
        since, away = self._now + drawn[:, 1] * (at - self._now), fleet["away"][where]
        late = gone & (away > self._deadline_s)
        soon = gone & ~late
        at[soon] += away[soon]
        ends[soon] += np.where(since < ends, away, 0.0)[soon]
        at[late] = since[late] + self._deadline_s
        self._back[where[late]] = (since + away)[late]
        lost |= late

    def _there(self, place: int, at_s: float) -> float:
        """From when on a site is there, at or after *at_s*."""
        which = int(self._fleet.trace[place])
        if which < 0:
            return at_s
        phase = float(self._fleet["phase"][place])
        return self._fleet.traces[which].next(at_s + phase) - phase

    def _by_trace(self, place: int, load: Load, computing_s: float) -> tuple[float, float, bool]:
        """(when the answer is there or given up, when computing ends, whether it is given up)."""
        fleet = self._fleet
        latency = float(fleet["latency"][place])
        there, gone = self._through(place, self._now, latency + load.down_bytes / float(fleet["down"][place]))
        if gone:
            return there, 0.0, True
        ends, gone = self._through(place, max(there, float(self._free[place])), computing_s)
        if gone:
            return ends, 0.0, True
        at, gone = self._through(place, ends, latency + load.up_bytes / float(fleet["up"][place]))
        return at + (load.trips - 1) * 2 * latency, ends, gone

    def _through(self, place: int, at_s: float, work_s: float) -> tuple[float, bool]:
        """When *work_s* of work is done that goes on only while the site is there, or when it is given up."""
        trace, phase = self._fleet.traces[int(self._fleet.trace[place])], float(self._fleet["phase"][place])
        while True:
            there = self._there(place, at_s)
            if there - at_s > self._deadline_s:
                self._back[place] = there
                return at_s + self._deadline_s, True
            until = trace.until(there + phase) - phase
            if there + work_s <= until:
                return there + work_s, False
            work_s -= until - there
            at_s = until if until > at_s else at_s + 1e-9 * max(1.0, at_s)  # on the very edge of a span
