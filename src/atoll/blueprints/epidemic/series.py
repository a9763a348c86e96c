"""A region's series as its site reads it for one day: cases and predictions by day and city, and what is wrong with it.

Rows are city-days. Nothing here leaves the site but what a handler makes of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from atoll.contract.program import SiteView
from atoll.contract.schema import TableSchema
from atoll.contract.wire import Array, Json
from atoll.models.installed import Base
from atoll.models.model import Predictor, from_spec, make
from atoll.models.rows import Rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CASES, PEOPLE, DAYS = 10**9, 10**10, 4 * 10**6
"""More new cases on a day, residents, and days after 1 January 1970 than there can be."""
MOST_GROWTH = 50.0
"""A larger logarithm counts as it."""
COMPLETE = 0.8
"""A day is there when so many of a region's cities reported on it."""
SOUND, EMPTY, NO_POPULATION, NEGATIVE, TWICE, NO_FEATURES = range(6)
WRONG: dict[int, tuple[str, str, str]] = {
    EMPTY: ("epidemic.no-rows", "the region has no row with new cases", "look at the site's source and dates"),
    NO_POPULATION: (
        "epidemic.no-population", "the region's population is missing or zero, or its rows do not agree on it",
        "fill the population column with the region's residents",
    ),
    NEGATIVE: (
        "epidemic.negative-cases", "new cases are negative: a correction downward was not cleaned",
        "take new cases of the cumulative counts by the recipe, and corrections as 0 (step range_rule)",
    ),
    TWICE: (
        "epidemic.reported-twice", "a city has two rows on the same day",
        "clean with the step deduplicate, or keep the last report (step resample)",
    ),
    NO_FEATURES: (
        "epidemic.no-features", "the model's features are missing on the region's newest day",
        "impute them in the recipe, or wait for the report",
    ),
}  # fmt: skip


class SavedModel(BaseModel):
    """A saved model, and how many days ahead it predicts: the new cases of the *days* days after a row's. model: its
    spec with its ``base``, the installed weights; or without one, and its *weights* written out.

    level: a column of cases a day lately, of a model that predicts *growth* g from it, as the recipe's step ``ratio``
    makes it with the same *plus* and ``log``: g = log((mean of the days to come + plus) / (level + plus)). The cases
    are then days · ((level + plus) · e^g − plus).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    days: int = Field(ge=1, le=90)
    model: dict[str, Json]
    weights: tuple[float, ...] | None = Field(default=None, max_length=4096)
    level: str | None = None
    plus: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> SavedModel:
        if (self.weights is None) == (self.model.get("base") is None):
            raise ValueError("a saved model has either a base (installed weights) or weights")
        return self

    @property
    def _spec(self) -> dict[str, Json]:
        return {name: value for name, value in self.model.items() if name != "base"}

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that it looks at, as far as its kind names them."""
        named = self.model.get("features")
        return tuple(str(name) for name in named) if isinstance(named, list | tuple) else ()

    def cases(self, told: Floats, table: Rows) -> Floats:
        """New cases of the *days* days, [rows], of what the model *told* of the rows of *table*, [rows]."""
        if self.level is None:
            return told
        level = np.asarray(table[self.level], np.float64) + self.plus
        return self.days * (level * np.exp(np.minimum(told, MOST_GROWTH)) - self.plus)

    def unfitted(self, schema: TableSchema) -> Predictor:
        """Without its weights, which need not be installed where nobody scores; raises PlanError."""
        return make(self._spec, schema)

    def fitted(self, schema: TableSchema) -> Predictor:
        """With its weights. Raises PlanError, and IntegrityError for a base that is not the plan's."""
        if self.weights is not None:
            arrays: dict[str, Array] = {"weights": np.array(self.weights)}
        else:
            arrays = dict(Base.model_validate(self.model["base"]).read())
        return from_spec(self._spec, schema, arrays)


class SeriesColumns(BaseModel):
    """Where a region's series stands. date: a date or datetime, or a number of days after 1 January 1970. city: None
    where rows are not told apart by city: those of a day are then added. cases: new cases that day. population:
    residents, of the whole "region" on each row or of the row's own "city"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: str
    city: str | None = None
    cases: str
    population: str
    population_of: str = Field(default="region", pattern="^(region|city)$")


def whole(site: SiteView) -> Rows:
    """All of a site's rows: a daily job holds none out."""
    training, held = site.table, site.holdout
    if not len(held):
        return Rows(training.schema, len(training), lambda name: training[name])
    return Rows(training.schema, len(training) + len(held), lambda name: np.concatenate([training[name], held[name]]))


def days_of(column: NDArray[np.generic]) -> Ints:
    """Days after 1 January 1970, [num_rows]; −1 where missing or out of any reason."""
    if column.dtype.kind == "M":
        days = column.astype("datetime64[D]").astype(np.int64)
    else:
        values = np.asarray(column, np.float64)
        days = np.where(np.isnan(values), -1, np.floor(np.nan_to_num(values))).astype(np.int64)
    return np.where((days >= 0) & (days < DAYS), days, -1)


@dataclass(frozen=True, slots=True)
class Series:
    """A region up to its newest day that is there. newest: that day, after 1 January 1970. rows: the place of the row
    of each day and city, [days, cities], −1 where there is none, the last day being *newest*. cases: the same, NaN.
    population: residents. wrong: SOUND, or what is wrong."""

    newest: int
    rows: Ints
    cases: Floats
    population: float
    wrong: int

    @property
    def total(self) -> Floats:
        """New cases of the region, [days]; NaN on days without a row."""
        known = ~np.isnan(self.cases)
        return np.where(known.any(axis=1), np.where(known, self.cases, 0.0).sum(axis=1), math.nan)


def read(table: Rows, columns: SeriesColumns, length: int, until: int = DAYS) -> Series:
    """The *length* days up to the newest that is there on day *until* or before."""
    dates, cases = days_of(table[columns.date]), np.asarray(table[columns.cases], np.float64)
    place = np.flatnonzero((dates >= 0) & (dates <= until) & ~np.isnan(cases))
    nothing = Series(0, np.full((length, 0), -1), np.empty((length, 0)), 0.0, EMPTY)
    if not len(place):
        return nothing
    day = dates[place]
    if columns.city is None:  # rows of a day are told apart by their order alone
        order = np.argsort(day, kind="stable")
        place, day = place[order], day[order]
        unit = np.arange(len(day)) - np.searchsorted(day, day)
    else:
        text = np.array([str(city) for city in table[columns.city][place]], object)
        _, unit = np.unique(text.astype(str), return_inverse=True)
    newest = _newest(day, unit)
    keep = (day <= newest) & (day > newest - length)
    place, day, unit = place[keep], day[keep], unit[keep]
    _, unit = np.unique(unit, return_inverse=True)
    at = day - (newest - length + 1)
    size = int(unit.max()) + 1
    rows, grid = np.full((length, size), -1), np.full((length, size), np.nan)
    rows[at, unit], grid[at, unit] = place, cases[place]
    wrong = SOUND
    population = _population(table, columns, place, at)
    if not population > 0:
        wrong = NO_POPULATION
    if (cases[place] < 0).any():
        wrong = NEGATIVE
    if len(np.unique(at * size + unit)) < len(at):
        wrong = TWICE
    return Series(newest, rows, grid, population if population > 0 else 0.0, wrong)


def _newest(day: Ints, unit: Ints) -> int:
    """The last day on which most of the cities reported that did in the two weeks before it."""
    for newest in np.unique(day)[::-1]:
        lately = (day <= newest) & (day > newest - 14)
        if len(np.unique(unit[day == newest])) >= COMPLETE * len(np.unique(unit[lately])):
            return int(newest)
    return int(day.min())


def _population(table: Rows, columns: SeriesColumns, place: Ints, at: Ints) -> float:
    """Residents of the region; NaN where rows do not say, or do not agree: no region has twice, or half, as many as
    lately."""
    values = np.asarray(table[columns.population], np.float64)[place]
    last = values[at == at.max()]
    if np.isnan(last).any() or (last <= 0).any():
        return math.nan
    if columns.population_of == "city":
        return float(min(last.sum(), PEOPLE))
    usual = float(np.median(values[values > 0]))
    agree = len(np.unique(last)) == 1 and usual / 2 <= last[0] <= usual * 2
    return float(min(last[0], PEOPLE)) if agree else math.nan


def predicted(series: Series, table: Rows, model: Predictor, saved: SavedModel) -> Floats:
    """The cases that *model*, fitted from *saved*, predicts for the region from each day, [days]; NaN without a row, or
    where a feature is missing."""
    places = series.rows[series.rows >= 0]
    found = np.full(series.rows.shape, np.nan)
    known = np.ones(len(places), bool)
    if model.spec()["kind"] != "trees":  # trees know what to do with a missing cell
        for name in saved.features:
            if table.schema.columns[name].numeric:
                known &= ~np.isnan(np.asarray(table[name], np.float64)[places])
    told = np.full(len(places), np.nan)
    if known.any():
        part = Rows.part(table, places[known])
        told[known] = saved.cases(np.asarray(model.predict(part), np.float64).reshape(-1), part)
    found[series.rows >= 0] = np.where(np.isfinite(told), np.clip(told, 0.0, CASES), np.nan)
    there = (series.rows >= 0).any(axis=1)
    gaps = (np.isnan(found) & (series.rows >= 0)).any(axis=1)
    sums = np.where(np.isnan(found), 0.0, found).sum(axis=1)
    return np.where(there & ~gaps, np.minimum(sums, CASES), math.nan)
