"""Who is asked in a round, and for how much work: by what was seen of the sites in this run's earlier rounds.

All of it follows from the plan and from what the run store holds of finished rounds, so that a coordinator that
was restarted goes on as it would have. Nothing here changes what a round's sum means: who is not asked is not in it.

Sources: Lai et al. 2021, Oort (OSDI), §4 (speed and utility in sampling); Stripelis, Thompson & Ambite 2022,
Semi-Synchronous Federated Learning (work by speed, so that all sites end together).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from atoll.contract.plan import Plan
from atoll.contract.rounds import Round


@dataclass(slots=True)
class Pace:
    """One site in the rounds until now. asked, answered: how often; unit_s: seconds of a full round's work, last."""

    asked: int = 0
    answered: int = 0
    unit_s: float = math.nan
    effort: float = 1.0


@dataclass(slots=True)
class Scheduler:
    """Of one run. quality: what sites told of their data, in (0, 1]."""

    plan: Plan
    sites: tuple[str, ...]
    quality: dict[str, float] = field(default_factory=dict)
    paces: dict[str, Pace] = field(default_factory=dict)

    def chosen(self, asked: Round, number: int, present: Sequence[str]) -> tuple[str, ...]:
        """Whom of the sites that are *present* round *number* asks, in cohort order."""
        if not asked.paced and asked.draw is None:
            return tuple(present)
        due = self._due(number, present)
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
        known = [pace.unit_s for pace in self.paces.values() if pace.unit_s > 0]
        own = self.paces[site].unit_s if site in self.paces else math.nan
        if least == 1 or not known or not own > 0:
            return 1.0
        return round(float(np.clip(np.median(known) / own, least, 1)), 2)

    def note(self, asked: Mapping[str, float], answered: Mapping[str, float]) -> None:
        """A paced round is over. asked: effort by site; answered: the seconds that those who answered took."""
        for site, effort in asked.items():
            pace = self.paces.setdefault(site, Pace())
            pace.asked += 1
            pace.effort = effort
            if site in answered:
                pace.answered += 1
                pace.unit_s = answered[site] / effort

    def _due(self, number: int, present: Sequence[str]) -> tuple[str, ...]:
        """Those whose turn it is by the plan's priorities; at least as many as the cohort's rule demands."""
        shares = {site: self.plan.schedule.priority.get(site, 1.0) for site in present}
        due = {site for site, share in shares.items() if math.floor((number + 1) * share) > math.floor(number * share)}
        waiting = sorted(shares.keys() - due, key=lambda site: -((number + 1) * shares[site] % 1))
        due |= set(waiting[: max(0, self.plan.cohort.min_sites - len(due))])
        return tuple(site for site in present if site in due)

    def _share(self, site: str) -> float:
        """How likely a site is to be drawn, beside the others."""
        share, pace = 1.0, self.paces.get(site, Pace())
        quickest = min((p.unit_s for p in self.paces.values() if p.unit_s > 0), default=math.nan)
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
