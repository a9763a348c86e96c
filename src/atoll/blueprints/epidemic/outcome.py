"""What the daily job reports, of what was summed and of what regions told of themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.blueprints.epidemic import links, mechanism
from atoll.blueprints.epidemic.backtest import log_errors, quantiles_of_errors
from atoll.blueprints.epidemic.risk import joint_risk, level_of
from atoll.blueprints.epidemic.series import CASES, SOUND, WRONG
from atoll.blueprints.epidemic.settings import DailyParams
from atoll.contract.disclosure import Cells
from atoll.contract.program import Cohort
from atoll.contract.rounds import Summed
from atoll.contract.wire import Array
from atoll.statistics.noise import smallest

Floats = NDArray[np.float64]
INCIDENCE = Cells("cases", "cases_withheld")


@dataclass(frozen=True, slots=True)
class Asked:
    """A day as it was asked about. status: of each site that told it, its newest day and what is wrong. present: the
    sites that are in the sum."""

    params: DailyParams
    cohort: Cohort
    day: int
    status: Mapping[str, tuple[int, int]]
    present: Sequence[str]

    def outcome(self, total: Summed, own: Mapping[str, Mapping[str, Array]]) -> dict[str, Any]:
        """The job's "epidemic". own: what regions told of themselves."""
        p, day = self.params, self.day
        hidden = INCIDENCE.hidden(total, smallest(self.cohort))
        reported = np.maximum(np.asarray(total["reported"], np.float64), 0)
        cases = np.maximum(np.asarray(total["cases"], np.float64), 0)
        regions = self._regions(total)
        every = reported >= max(regions, 1)
        known = np.where(every, np.where(hidden, self.cohort.min_group_size / 2, cases), math.nan)
        people = np.maximum(np.asarray(total["population"], np.float64), 0)
        risk = joint_risk(np.asarray(total["weighted"], np.float64), people)
        seen = mechanism.seen(known, day, int(people[-1]), p.seir_days, p.interventions, p.interval)
        absent = [site for site in self.cohort.sites if site not in self.present]
        return {
            "day": _date(day),
            "partial": bool(absent) or (self.cohort.exact and regions < len(self.present)),
            "absent": absent,
            "late": [site for site in self.present if site in self.status and self.status[site][0] < day],
            "problems": self.problems(),
            "window_days": p.window_days,
            "ceiling_per_100k": p.ceiling_per_100k,
            "joint": {
                "risk": _told(risk[-1]),
                "sum": max(float(total["risk"][-1]), 0.0),
                "by_day": _by_day(day, risk),
                "population": int(people[-1]),
                **self._level(risk[-1], action=True),
                "levels": [{"level": one.level, "from": one.at} for one in p.marks],
            },
            "regions": {site: self._region(own[site]) if site in own else None for site in self.present},
            "incidence": [
                {"day": _date(day - len(cases) + 1 + i), "cases": None if hidden[i] else int(cases[i]),
                 "regions": int(reported[i])}
                for i in range(len(cases)) if reported[i] > 0
            ],
            "forecast": {"learned": self._learned(total, known), "seir": seen["seir"], "note": self._doubtful(known)},
            "drivers": self._drivers(total),
            "alarms": self._alarms(total),
            "links": links.told(),
            **{name: found for name, found in seen.items() if name != "seir"},
        }  # fmt: skip

    def problems(self) -> list[dict[str, str]]:
        """Why each site is not in the sum that told its newest day, but is absent."""
        return [self._problem(site) for site in self.cohort.sites if site in self.status and site not in self.present]

    def _problem(self, site: str) -> dict[str, str]:
        newest, wrong = self.status[site]
        known = WRONG.get(wrong, ("epidemic.unknown", "the region's table cannot be scored", ""))
        if wrong == SOUND and newest < self.day - self.params.max_age_days:
            told = f"its newest day is {_date(newest)}, more than {self.params.max_age_days} days before"
            remedy = "send the days that are missing, with as many cities as before, or raise params.max_age_days"
            known = ("epidemic.too-late", told, remedy)
        elif wrong == SOUND:
            known = ("epidemic.dropped-out", "it told its newest day, and then dropped out", "see its own log")
        return {"site": site, **dict(zip(("code", "message", "remedy"), known, strict=True))}

    def _regions(self, total: Summed) -> int:
        """How many are in the sum; under noise one, as nobody knows."""
        return int(total["regions"]) if self.cohort.exact else 1

    def _learned(self, total: Summed, cases: Floats) -> list[dict[str, Any]]:
        """The joint forecast by horizon. cases: of the joint area, [days], NaN where not of all regions."""
        every = np.asarray(total["foreseen"]) >= max(self._regions(total), 1)
        values = np.where(every, np.asarray(total["predicted"]), math.nan)
        return [
            {"days": model.days, **interval(row[-1], past_errors(row, cases, model.days), self.params.interval)}
            for model, row in zip(self.params.models, values, strict=True)
        ]

    def _doubtful(self, cases: Floats) -> str:
        """Which horizons' models may have learned from too few days, "" if none; *cases* as of :meth:`_learned`."""
        known = {model.days: followed(cases, model.days) for model in self.params.models}
        few = {days: least for days, seen in known.items() if seen is not None and seen < (least := enough(days))}
        return "; ".join(
            f"do not rely on the {days}-day forecast: what followed is known of only {known[days]} days since the "
            f"first cases, and a model needs {least}, unless it has learned from an earlier wave"
            for days, least in sorted(few.items())
        )

    def _region(self, own: Mapping[str, Array]) -> dict[str, Any]:
        alarm, risk = int(own["alarm_since"]), np.clip(np.asarray(own["risk"], np.float64), 0.0, 1.0)
        rows = zip(self.params.models, np.clip(own["forecast"], 0.0, CASES), strict=True)
        return {
            "risk": _told(risk[-1]),
            "by_day": _by_day(self.day, risk),
            "forecast": [
                {"days": model.days, **dict(zip(("mean", "low", "high"), map(_told, row), strict=True))}
                for model, row in rows
            ],
            "alarm": alarm > 0,
            "alarm_since": _date(alarm) if alarm > 0 else None,
            **self._level(risk[-1]),
        }

    def _level(self, risk: float, *, action: bool = False) -> dict[str, str | None]:
        found = level_of(float(risk), self.params.marks)
        level = {"level": found.level if found else None}
        return {**level, "action": found.action if found else None} if action else level

    def _drivers(self, total: Summed) -> list[dict[str, Any]]:
        names = self.params.risk_model.features
        if not names:
            return []
        ranked = sorted(zip(names, total["drivers"].tolist(), strict=True), key=lambda pair: -pair[1])
        return [{"feature": name, "importance": max(value, 0.0)} for name, value in ranked]

    def _alarms(self, total: Summed) -> dict[str, Any]:
        regions, cities, of = (max(int(value), 0) for value in total["alarms"])
        found: dict[str, Any] = {"regions": regions, "joint": regions >= self.params.alarm.regions}
        return found | ({"cities": cities, "of_cities": of} if self.params.series.city is not None else {})


def enough(days: int) -> int:
    """Of how many days the *days* days after them must be known to learn from: two weeks, and two such spans, as
    those of neighbouring days are nearly the same."""
    return max(14, 2 * days)


def followed(cases: Floats, days: int) -> int | None:
    """Of how many days since the first case it is known how many came in the *days* days after; None where there was
    no case, or one on the first of all days, before which there may have been more. cases: [days], NaN unknown."""
    some = np.flatnonzero(np.nan_to_num(cases) > 0)
    if not len(some) or some[0] == 0:
        return None
    gaps = np.cumsum(np.append(0, np.isnan(cases)))[some[0] + 1 :]
    return int((gaps[days:] == gaps[:-days]).sum()) if len(gaps) > days else 0


def past_errors(forecast: Floats, cases: Floats, days: int) -> Floats:
    """Errors (``backtest.log_errors``) of forecasts whose days are over, in order. forecast: of the *days* days after
    each, [days]; cases: new cases by day, the last day being the forecast's last, [≥ days]; NaN where unknown."""
    cases = cases[-len(forecast) :]
    ends = np.cumsum(np.append(0.0, np.nan_to_num(cases)))
    gaps = np.cumsum(np.append(0, np.isnan(cases)))
    truth = ends[1 + days :] - ends[1:-days]
    made = forecast[: len(truth)]
    known = (gaps[1 + days :] == gaps[1:-days]) & ~np.isnan(made)
    return log_errors(truth[known], made[known])


def interval(mean: float, errors: Floats, level: float) -> dict[str, float | None]:
    """A forecast with its interval, by its model's past *errors*; all None where it is NaN."""
    if math.isnan(mean):
        return {"mean": None, "low": None, "high": None}
    low, _, high = quantiles_of_errors(np.array([mean]), errors, (1 - level,))[0]
    return {"mean": max(float(mean), 0.0), "low": float(low), "high": float(high)}


def _date(day: int) -> str:
    return str(np.datetime64(int(day), "D"))


def _told(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _by_day(day: int, risk: Floats) -> list[dict[str, Any]]:
    """Where it is known; the last is of *day*."""
    first = day - len(risk) + 1
    return [{"day": _date(first + i), "risk": float(value)} for i, value in enumerate(risk) if not math.isnan(value)]
