"""Who is asked in a round, and for how much work: by what was seen of the sites in this run's earlier rounds.

All of it follows from the plan and from what the run store holds of finished rounds, so that a coordinator that
was restarted goes on as it would have. Nothing here changes what a round's sum means: who is not asked is not in it.

Sources: Lai et al. 2021, Oort (OSDI), §4 (speed and utility in sampling); Stripelis, Thompson & Ambite 2022,
Semi-Synchronous Federated Learning (work by speed, so that all sites end together).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from atoll.contract.errors import AtollError, TransportError
from atoll.contract.plan import Plan
from atoll.contract.protection import REPLY, find
from atoll.contract.rounds import Round, Sum
from atoll.contract.schedule import EFFORT, Schedule
from atoll.privacy.secagg.graph import threshold
from atoll.runtime.store import RunStore
from atoll.transport.base import Traffic

BEFORE = ("shares", REPLY)
"""Steps of a round up to a site's own answer: for these a late site is not waited for."""

LOST = ("site.out-of-memory", "site.diverged", "compression.no-base")
"""Of a site that cannot do its work."""


def is_dropout(error: AtollError) -> bool:
    """A site that cannot be reached, or cannot do its work: others may go on without it."""
    ours = error.code.startswith("spool.")  # it is the coordinator that has no room
    return (isinstance(error, TransportError) and not ours) or error.code in LOST


@dataclass(slots=True)
class Pace:
    """One site in the rounds until now. asked, answered: how often; unit_s: seconds of a full round's work, last: of
    one that was late at least so many, and twice as many each time."""

    asked: int = 0
    answered: int = 0
    unit_s: float = math.nan
    effort: float = 1.0


@dataclass(slots=True)
class Scheduler:
    """Of one run. quality: what sites told of their data, in (0, 1]. turn: rounds of the schedule that are over. took:
    seconds by site, of rounds under way. traffic_before: bytes of the run before this process drove it. units: what is
    known of ``unit_s`` until another round is over."""

    plan: Plan
    run: str = ""
    quality: dict[str, float] = field(default_factory=dict)
    paces: dict[str, Pace] = field(default_factory=dict)
    turn: int = 0
    took: dict[int, dict[str, float]] = field(default_factory=dict)
    traffic_before: int = 0
    units: tuple[int, float, float] | None = None

    @staticmethod
    def resumed(plan: Plan, run: str, store: RunStore) -> Scheduler:
        """As it was after the run's last finished round."""
        found = Scheduler(plan, run, traffic_before=store.spent(run, 2**31)[1])
        for paces in store.paces(run):
            found.note(*paces)
        return found

    def choose(self, asked: Round, number: int, present: Sequence[str]) -> tuple[Round, tuple[str, ...]]:
        """Round *number* with what each site is asked to do of it, and whom it asks, in cohort order."""
        sites = self.chosen(asked, number, present)
        if asked.draw is not None or (asked.paced and self.plan.schedule.priority):
            asked = replace(asked, sites=sites, among=len(sites) >= (asked.draw or 1))
        if asked.paced and self.plan.schedule.effort_min < 1:
            efforts = {site: {**asked.send_to.get(site, {}), EFFORT: self.effort(site)} for site in sites}
            asked = replace(asked, send_to=efforts)
        return asked, sites

    def within_s(self, asked: Round, step: str) -> float | None:
        """How long a *step* of a round waits for sites that do not answer; None: until they drop out."""
        return self.plan.schedule.within_s if asked.paced and step in BEFORE else None

    def least(self, asked: Round, num_sites: int) -> int:
        """How many answers a round waits for, however late they are: without these there is no sum. num_sites: of the
        cohort."""
        choice, rule = self.plan.protection, self.plan.cohort.min_sites
        if not isinstance(asked.reduce, Sum) or not find(choice.sum).attempts:
            return rule
        among = len(asked.sites) if asked.among and asked.sites is not None else num_sites
        return max(rule, threshold(among, choice.adversary))

    def answered(self, number: int, site: str, step: str, seconds: float) -> None:
        """A site answered a step of a round."""
        if step == REPLY:
            self.took.setdefault(number, {})[site] = seconds

    def over(self, asked: Round, number: int, sites: Sequence[str]) -> dict[str, tuple[float, float | None]]:
        """What the schedule learns from a round that is over, by site: the effort it was asked for, and the seconds it
        took (None: it was late, or dropped out); nothing, where it is none of the schedule's rounds."""
        took = self.took.pop(number, {})
        if not asked.paced or self.plan.schedule == Schedule():
            return {}
        efforts = {site: float(asked.send_to.get(site, {}).get(EFFORT, 1.0)) for site in sites}
        self.note(efforts, took)
        return {site: (effort, took.get(site)) for site, effort in efforts.items()}

    def used_up(self, store: RunStore, before: int) -> bool:
        """Did the rounds before number *before* use up what the plan's schedule lets them?"""
        schedule = self.plan.schedule
        if schedule.stop_after_s is None and schedule.stop_after_bytes is None:
            return False
        seconds, size = store.spent(self.run, before)
        return seconds >= (schedule.stop_after_s or math.inf) or size >= (schedule.stop_after_bytes or math.inf)

    def travelled(self, traffic: Mapping[str, Traffic]) -> int:
        """Bytes of the run until now, where its schedule limits them."""
        if self.plan.schedule.stop_after_bytes is None:
            return 0
        passed = traffic[self.run]
        return self.traffic_before + passed.to_sites_bytes + passed.from_sites_bytes

    def chosen(self, asked: Round, number: int, present: Sequence[str]) -> tuple[str, ...]:
        """Whom of the sites that are *present* round *number* asks, in cohort order."""
        if not asked.paced and asked.draw is None:
            return tuple(present)
        due = self._due(present) if asked.paced else tuple(present)
        if asked.draw is None or asked.draw >= len(due):
            return due
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.plan.run.seed, number, 1))))
        shares = np.array([self._share(site) for site in due])
        if not self.plan.schedule.sample:  # all alike, and the same draw for everybody who knows the plan's seed
            drawn = random.choice(len(due), asked.draw, replace=False)
        else:
            drawn = random.choice(len(due), asked.draw, replace=False, p=shares / shares.sum())
        return tuple(due[place] for place in sorted(drawn))

    def effort(self, site: str) -> float:
        """Share of a round's local work that the site is asked for."""
        least = self.plan.schedule.effort_min
        known, typical, _ = self._known()
        own = self.paces[site].unit_s if site in self.paces else math.nan
        if least == 1 or not known or not own > 0:
            return 1.0
        return round(float(np.clip(typical / own, least, 1)), 2)

    def note(self, asked: Mapping[str, float], answered: Mapping[str, float]) -> None:
        """A paced round is over. asked: effort by site; answered: the seconds that those who answered took."""
        self.units = None
        self.turn += 1
        for site, effort in asked.items():
            pace = self.paces.setdefault(site, Pace())
            pace.asked += 1
            pace.effort = effort
            if site in answered:
                pace.answered += 1
                pace.unit_s = answered[site] / effort
            elif self.plan.schedule.within_s is not None:
                pace.unit_s = 2 * max(np.nan_to_num(pace.unit_s), self.plan.schedule.within_s / effort)

    def _due(self, present: Sequence[str]) -> tuple[str, ...]:
        """Those whose turn it is by the plan's priorities; at least as many as the cohort's rule demands."""
        number = self.turn
        shares = {site: self.plan.schedule.priority.get(site, 1.0) for site in present}
        due = {site for site, share in shares.items() if math.floor((number + 1) * share) > math.floor(number * share)}
        waiting = sorted(shares.keys() - due, key=lambda site: -((number + 1) * shares[site] % 1))
        due |= set(waiting[: max(0, self.plan.cohort.min_sites - len(due))])
        return tuple(site for site in present if site in due)

    def _known(self) -> tuple[int, float, float]:
        """(how many sites' ``unit_s`` are known, their median, the least), found once a round."""
        if self.units is None:
            known = [pace.unit_s for pace in self.paces.values() if pace.unit_s > 0]
            middle, least = (float(np.median(known)), min(known)) if known else (math.nan, math.nan)
            self.units = (len(known), middle, least)
        return self.units

    def _share(self, site: str) -> float:
        """How likely a site is to be drawn, beside the others."""
        share, pace = 1.0, self.paces.get(site, Pace())
        _, _, quickest = self._known()
        for factor in self.plan.schedule.sample:
            if factor == "availability":
                share *= (pace.answered + 1) / (pace.asked + 1)
            elif factor == "speed":
                share *= quickest / pace.unit_s if pace.unit_s > 0 else 1.0  # who was not asked yet is worth a try
            elif factor == "quality":
                share *= self.quality.get(site, 1.0)
            else:
                share *= self.plan.schedule.priority.get(site, 1.0)
        return max(share, 1e-6)
