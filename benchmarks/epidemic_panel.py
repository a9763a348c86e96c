"""The real series of the epidemic backtest: new confirmed cases a day of four regions, and what each row knows.

Two sets. ``cities``: the cities and districts of Shanghai, Jiangsu, Zhejiang and Anhui, 2020, from the commissions'
bulletins. ``provinces``: the same four as whole provinces, January 2020 to March 2023, from JHU CSSE (for Shanghai
2022: confirmed cases, without those that had no symptoms). Both as they stand today: a correction is not dated, so that
what a forecaster of the day had before it may have differed.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DATA = Path(os.environ.get("ATOLL_DATA", Path(__file__).parents[2] / "shared" / "data"))
CITIES = "covid19-china-cities/china_national_province_city_daily.csv.gz"
PROVINCES = "covid19-jhu-timeseries/china_provinces_long.csv.gz"
CHINESE = {"shanghai": "上海市", "jiangsu": "江苏省", "zhejiang": "浙江省", "anhui": "安徽省", "hubei": "湖北省"}
RESIDENTS = {"shanghai": 24_870_895.0, "jiangsu": 84_748_016.0, "zhejiang": 64_567_588.0, "anhui": 61_027_171.0}
"""Census of 2020."""
SITES = tuple(RESIDENTS)
FEATURES = (
    "new", "new_lag1", "new_lag2", "new_lag3", "new_mean3", "new_mean7", "new_mean14", "hubei_mean3", "hubei_mean7",
    "hubei_lag7", "national_mean3", "national_mean7", "national_lag7",
)  # fmt: skip
"""New cases as they are."""
RATIOS = (
    "growth_day", "growth_day_before", "growth_week", "growth_fortnight", "growth_3", "growth_7", "new_mean7",
    "growth_hubei_week", "growth_hubei_7", "growth_national_week", "growth_national_7",
)  # fmt: skip
"""Logarithms of ratios, and the size in which they are more or less certain, as in ``examples/epidemic``."""


def growth(above: Floats, below: Floats, plus: float = 0.5) -> Floats:
    """log((above + plus) / (below + plus))."""
    return np.asarray(np.log((above + plus) / (below + plus)))


def lagged(daily: Floats, days: int) -> Floats:
    """The series so many days before, [..., T]; before its begin there are no cases."""
    return np.concatenate([np.zeros((*daily.shape[:-1], days)), daily[..., : daily.shape[-1] - days]], -1)


def moving(daily: Floats, days: int) -> Floats:
    """Mean over the *days* up to each day, [..., T]; before the series' begin there are no cases."""
    sums = np.cumsum(np.concatenate([np.zeros((*daily.shape[:-1], days)), daily], -1), -1)
    return np.asarray((sums[..., days:] - sums[..., :-days]) / days)


@dataclass(frozen=True, eq=False)
class Panel:
    """Units (cities or provinces) by day. new: [units, T]; site: each unit's region, [units]; days: [T]."""

    days: NDArray[np.datetime64]
    site: NDArray[np.int64]
    new: Floats
    hubei: Floats
    national: Floats

    def at(self, day: str) -> int:
        """The place of a day."""
        return int(np.searchsorted(self.days, np.datetime64(day)))

    @cached_property
    def by_site(self) -> Floats:
        """New cases of each region, [sites, T]."""
        return np.stack([self.new[self.site == k].sum(0) for k in range(len(SITES))])

    @cached_property
    def features(self) -> Floats:
        """What is known of a unit by the end of a day, [units, T, features]."""
        own = [*(lagged(self.new, days) for days in range(4)), *(moving(self.new, days) for days in (3, 7, 14))]
        public = [
            np.broadcast_to(found, self.new.shape)
            for daily in (self.hubei, self.national)
            for found in (moving(daily, 3), moving(daily, 7), lagged(daily, 7))
        ]
        return np.stack([*own, *public], -1)

    @cached_property
    def level(self) -> Floats:
        """Cases a day lately, from which growth is reckoned, [units, T]."""
        return moving(self.new, 3)

    @cached_property
    def ratios(self) -> Floats:
        """As *features*, of RATIOS."""

        def of(daily: Floats) -> list[Floats]:
            week = moving(daily, 7)
            return [growth(moving(daily, 3), week), growth(week, lagged(week, 7))]

        new, three, week = self.new, moving(self.new, 3), moving(self.new, 7)
        (own_week, own_7), public = of(new), [*of(self.hubei), *of(self.national)]
        own = [growth(new, three), growth(lagged(new, 1), three), own_week, growth(week, moving(new, 14)),
               growth(three, lagged(three, 3)), own_7, week]  # fmt: skip
        return np.stack([*own, *(np.broadcast_to(found, new.shape) for found in public)], -1)

    @cache  # noqa: B019 – a panel lives as long as the run
    def ahead(self, days: int) -> Floats:
        """Cases of each unit summed over the *days* after each day, [units, T]; NaN where they are not over yet."""
        sums = np.cumsum(np.concatenate([np.zeros((len(self.new), 1)), self.new], 1), 1)
        found = np.full(self.new.shape, np.nan)
        found[:, : self.new.shape[1] - days] = sums[:, days + 1 :] - sums[:, 1 : self.new.shape[1] - days + 1]
        return found

    def truth(self, at: int, days: int) -> Floats:
        """Cases of each region summed over the *days* after day *at*, [sites]."""
        return np.asarray(self.by_site[:, at + 1 : at + 1 + days].sum(1))


def _rises(cumulative: dict[str, float], days: list[str]) -> Floats:
    """New cases a day: a missing day carries the count on, a correction downward counts as no case."""
    filled, last = [], 0.0
    for day in days:
        last = cumulative.get(day, last)
        filled.append(last)
    return np.maximum(np.diff(filled, prepend=0.0), 0.0)


def _rows(name: str) -> Iterable[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _calendar(first: str, last: str) -> list[str]:
    return [str(day) for day in np.arange(np.datetime64(first), np.datetime64(last) + 1)]


def _panel(units: dict[tuple[str, str], dict[str, float]], hubei: dict[str, float], nation: dict[str, float],
           days: list[str]) -> Panel:  # fmt: skip
    return Panel(
        np.array(days, "datetime64[D]"),
        np.array([SITES.index(site) for site, _ in units]),
        np.stack([_rises(one, days) for one in units.values()]),
        _rises(hubei, days),
        _rises(nation, days),
    )


def cities() -> Panel:
    """From 2020-01-20 on; sums over cities run slightly below the provinces' own totals."""
    region = {chinese: site for site, chinese in CHINESE.items()}
    units: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    hubei, nation = dict[str, float](), dict[str, float]()
    for row in _rows(CITIES):
        site, day, count = region.get(row["province"], ""), row["date"], float(row["confirmed"] or 0)
        if not row["province"]:
            nation[day] = count
        elif site == "hubei" and not row["city"]:
            hubei[day] = count
        elif site in SITES and row["city"]:
            units[site, row["city"]][day] = count
    return _panel(units, hubei, nation, _calendar("2020-01-20", max(nation)))


def provinces() -> Panel:
    """From 2020-01-22 to 2023-03-09."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    nation: dict[str, float] = defaultdict(float)
    for row in _rows(PROVINCES):
        found[row["Province_State"].lower()][row["date"]] = float(row["cum_confirmed"])
        if row["Country_Region"] == "China" and row["Province_State"] not in ("Hong Kong", "Macau", "Unknown"):
            nation[row["date"]] += float(row["cum_confirmed"])
    units = {(site, site): found[site] for site in SITES}
    return _panel(units, found["hubei"], nation, _calendar(min(nation), max(nation)))
