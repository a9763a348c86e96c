"""What became of a simulated run: its rounds as they went, metrics, dropouts, traffic, and who was waited for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.transport.base import Traffic


@dataclass(frozen=True, slots=True)
class Done:
    """One round as it went. began_s, seconds: on the run's clock. asked, answered: how many sites; late: left out as
    they had not answered in time; lost: dropped out. last: who was waited for; typical_s: the median site's time."""

    number: int
    stage: str
    name: str
    began_s: float
    seconds: float
    asked: int
    answered: int
    late: int = 0
    lost: int = 0
    last: str = ""
    typical_s: float = 0.0


@dataclass
class Simulated:
    """What became of a run. outcome: the study's (None: it came to no end). dropouts: when, site and why. Of each site,
    [num_sites]: to_bytes, from_bytes; computed_s; waited_s, how long the others waited for it."""

    run: str
    num_sites: int
    outcome: dict[str, Any] | None = None
    rounds: list[Done] = field(default_factory=list)
    num_rounds: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    dropouts: list[tuple[float, str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.to_bytes, self.from_bytes = np.zeros(self.num_sites), np.zeros(self.num_sites)
        self.waited_s, self.computed_s = np.zeros(self.num_sites), np.zeros(self.num_sites)
        self._arrivals = False

    @property
    def traffic(self) -> Traffic:
        """Of all sites."""
        return Traffic(round(float(self.to_bytes.sum())), round(float(self.from_bytes.sum())))

    def count(self, where: NDArray[np.int64], down: int, up: int, answered: NDArray[np.bool_]) -> None:
        """The sites at these places were sent so many bytes, and those that *answered* sent so many."""
        self.to_bytes[where] += down
        self.from_bytes[where[answered]] += up

    def log(self, done: Done) -> None:
        """A round is over."""
        self.rounds.append(done)
        self.num_rounds += 1
        self._arrivals = False

    def arrived(self, done: Done) -> None:
        """A round of one arrival is over; arrivals one after the other are told of together."""
        before = self.rounds[-1] if self.rounds else None
        if before is not None and before.name == done.name and self._arrivals:
            seconds = done.began_s + done.seconds - before.began_s
            many = before.answered + 1
            self.rounds[-1] = replace(before, seconds=seconds, asked=many, answered=many, last=done.last)
            self.num_rounds += 1
        else:
            self.log(done)
        self._arrivals = True
