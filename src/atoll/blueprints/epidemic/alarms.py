"""Anomaly alarms on a region's series of new cases, multi-point triggers, and how early alarms were.

c2, c3: the Early Aberration Reporting System: each day is compared with the mean and deviation of the *baseline* days
that end *lag* days before it. C2 = (y − mean) / deviation alarms above *threshold*; C3 = Σ max(0, C2 − 1) over a day
and the two before it alarms above 2, and so sees slower rises. A deviation below *min_deviation* counts as that, as
proposed for sparse counts: after a week of zeros two cases alarm, and one does not. A day alarms only with a case on
it. cusum: Page's one-sided sum S = max(0, S + C2 − drift) alarms above *limit*, and begins anew
after an unknown day.

A series begins with its first report, and days before it count as without cases (:func:`from_none`): the first cases of
a place are what an alarm is for. In a table that is merely cut off, the first days may alarm for that.

Multi-point trigger: a region is in alarm where its own series is, or where enough of its cities are on the same day.

Sources: Hutwagner et al. 2003, J Urban Health 80(2 Suppl 1):i89–i96 (EARS); Fricker, Hegler & Dunfee 2008, Statistics
in Medicine 27:3407–3429, §2 (its C2 and C3 as used here); R package surveillance, earsC, minSigma (after Burkom);
Page 1954, Biometrika 41:100–115.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
C3_LIMIT = 2.0


class AlarmRule(BaseModel):
    """How a series alarms, and which cities' alarms are their region's. cities: so many of a region's cities at once
    put it in alarm (0: only its own series does). regions: so many regions in alarm are a joint alarm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["c2", "c3", "cusum"] = "c2"
    baseline: int = Field(default=7, ge=3, le=366)
    lag: int = Field(default=2, ge=0, le=30)
    threshold: float = Field(default=3.0, gt=0)
    min_deviation: float = Field(default=0.5, gt=0)
    drift: float = Field(default=1.0, ge=0)
    limit: float = Field(default=4.0, gt=0)
    cities: int = Field(default=3, ge=0)
    regions: int = Field(default=2, ge=1)

    @property
    def reach_days(self) -> int:
        """Days before a day that its alarm is made of, but for a CUSUM's memory."""
        return self.baseline + self.lag + 2


USUAL = AlarmRule()


def deviations(cases: Floats, rule: AlarmRule = USUAL) -> Floats:
    """C2 of each day, shaped as *cases* [days, …]; NaN where the day, or more than half of its baseline, is unknown."""
    found = np.full(cases.shape, np.nan)
    for day in range(rule.baseline + rule.lag, len(cases)):
        before = cases[day - rule.lag - rule.baseline : day - rule.lag]
        known = ~np.isnan(before)
        number = known.sum(axis=0)
        enough = 2 * number > rule.baseline
        mean = np.where(known, before, 0.0).sum(axis=0) / np.maximum(number, 1)
        spread = np.where(known, (before - mean) ** 2, 0.0).sum(axis=0) / np.maximum(number - 1, 1)
        score = (cases[day] - mean) / np.maximum(np.sqrt(spread), rule.min_deviation)
        found[day] = np.where(enough, score, np.nan)
    return found


def from_none(cases: Floats) -> Floats:
    """*cases* [days, …] with 0 on the days before the first that is known; a series of which none is stays unknown."""
    known = ~np.isnan(cases)
    before = ~np.maximum.accumulate(known, axis=0) & known.any(axis=0)
    return np.where(before, 0.0, cases)


def alarms(cases: Floats, rule: AlarmRule = USUAL) -> Flags:
    """Which days alarm, shaped as *cases* [days, …]: new cases on consecutive days, NaN where unknown."""
    score = deviations(cases, rule)
    known = ~np.isnan(score)
    if rule.method == "c2":
        over = np.where(known, score, 0.0) > rule.threshold
    elif rule.method == "c3":
        part = np.maximum(np.where(known, score, 0.0) - 1, 0.0)
        three = part.copy()
        three[1:] += part[:-1]
        three[2:] += part[:-2]
        over = known & (three > C3_LIMIT)
    else:
        over, total = np.zeros(cases.shape, bool), np.zeros(cases.shape[1:])
        for day in range(len(cases)):
            total = np.where(known[day], np.maximum(total + np.nan_to_num(score[day]) - rule.drift, 0.0), 0.0)
            over[day] = total > rule.limit
    flags: Flags = over & (np.nan_to_num(cases) > 0)
    return flags


def multi_point(region: Flags, cities: Flags, rule: AlarmRule = USUAL) -> Flags:
    """Which days a region is in alarm, [days]: by its own series [days], or by enough of its cities [days, cities]."""
    if rule.cities == 0:
        return region
    joint: Flags = region | (cities.sum(axis=1) >= rule.cities)
    return joint


def since(flags: Flags) -> int | None:
    """The day from which on all of *flags* [days] up to the last are alarms; None if the last is none."""
    if not len(flags) or not flags[-1]:
        return None
    calm = np.flatnonzero(~flags)
    return int(calm[-1]) + 1 if len(calm) else 0


def lead_times(flags: Flags, starts: Sequence[int], *, before: int = 14, after: int = 7) -> list[int | None]:
    """By how many days the first alarm within [start − before, start + after] came before each known wave's start.

    Negative: after it; None: the wave was missed. flags: [days]; starts: places of days. The recall is the share that
    is not None.
    """
    found: list[int | None] = []
    for start in starts:
        begin = max(start - before, 0)
        hits = np.flatnonzero(flags[begin : start + after + 1])
        found.append(start - (begin + int(hits[0])) if len(hits) else None)
    return found
