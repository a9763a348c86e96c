"""The forecasters of the epidemic backtest. Each sees the panel up to the origin's day, and nothing after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import PoissonRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from statsmodels.tsa.arima.model import ARIMA
from statsmodels.tsa.holtwinters import ExponentialSmoothing

from atoll.blueprints.epidemic import seir
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models.trees import Trees, TreesSpec
from atoll.trees.alone import Alone
from atoll.trees.binning import Bins, tidy
from atoll.trees.objective import make
from benchmarks.epidemic_panel import FEATURES, RATIOS, RESIDENTS, SITES, Panel, growth, moving
from benchmarks.learning import driven

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
HORIZONS = (1, 3, 7, 14)
HISTORY = 120
"""Days that ARIMA, ETS and SEIR are fitted to: the latest."""
LEAST = 20
"""Fewest rows of a leaf."""
PLUS, FEWEST = 2.0, 14
"""Of growth: cases added to both parts of the ratio that is foretold; with targets of fewer days nothing is learned."""
MOST = 200_000.0
"""Cases a day, of the schema."""
Forecaster = Callable[[Panel, int], Floats]
"""(panel, origin's place) → cases of each region summed over each horizon's days, [sites, horizons]."""


def persistence(panel: Panel, at: int) -> Floats:
    """Every day will be as today."""
    return np.outer(panel.by_site[:, at], HORIZONS)


def weekly(panel: Panel, at: int) -> Floats:
    """Every day will be as the mean of the last seven."""
    return np.outer(moving(panel.by_site[:, : at + 1], 7)[:, -1], HORIZONS)


def recent(panel: Panel, at: int) -> Floats:
    """Every day will be as the mean of the last three: growth's level, with no growth."""
    return np.outer(moving(panel.by_site[:, : at + 1], 3)[:, -1], HORIZONS)


def _bounded(daily: Floats, path: Floats) -> list[float]:
    """A path's sums over each horizon, no day of it above ten times the highest so far: an exponential that runs away
    is no forecast."""
    highest = 10 * max(daily.max(), 1.0)
    sums = np.cumsum(np.clip(np.nan_to_num(path, posinf=highest), 0, highest))
    return [float(sums[days - 1]) for days in HORIZONS]


def _by_series(panel: Panel, at: int, project: Callable[[Floats], Floats]) -> Floats:
    made = []
    for k in range(len(SITES)):
        daily = panel.by_site[k, max(0, at + 1 - HISTORY) : at + 1]
        path = project(daily) if daily.any() and len(daily) > 4 else np.zeros(max(HORIZONS))
        made.append(_bounded(daily, path))
    return np.array(made)


def _arima(daily: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = ARIMA(np.log1p(daily), order=(1, 1, 1)).fit(method_kwargs={"maxiter": 30})
        return np.asarray(np.expm1(fitted.forecast(max(HORIZONS))))


def _ets(daily: Floats) -> Floats:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ExponentialSmoothing(np.log1p(daily), trend="add", damped_trend=True, initialization_method="estimated")
        return np.asarray(np.expm1(model.fit().forecast(max(HORIZONS))))


def arima(panel: Panel, at: int) -> Floats:
    """ARIMA(1, 1, 1) of each region's log(1 + cases)."""
    return _by_series(panel, at, _arima)


def ets(panel: Panel, at: int) -> Floats:
    """Exponential smoothing with a damped trend of each region's log(1 + cases)."""
    return _by_series(panel, at, _ets)


def mechanistic(panel: Panel, at: int) -> Floats:
    """SEIR of each region, R as it is now; where the series says no R, the mean of the last seven days."""
    made = weekly(panel, at)
    for k, residents in enumerate(RESIDENTS.values()):
        fitted = seir.fit(panel.by_site[k, : at + 1], residents, draws=20)
        if isinstance(fitted, seir.SeirFit):
            made[k] = _bounded(panel.by_site[k, : at + 1], seir.project(fitted, max(HORIZONS)).mean)
    return made


Fit = Callable[[Floats, Floats, Floats], Floats]
"""(features, target, features to tell of) → predictions."""


@dataclass(frozen=True)
class Learner:
    """How trees learn: settings of ``trees.boosted``. ratios: the target is growth, else cases a day."""

    features: tuple[str, ...]
    objective: str
    num_trees: int
    depth: int
    rate: float
    bins: int
    l2: float
    ratios: bool

    @property
    def schema(self) -> TableSchema:
        """Of the rows that trees learn from."""
        most = float(growth(np.array(MOST), np.array(0.0), PLUS))
        ends = (-most, most) if self.ratios else (0.0, MOST)
        columns = {name: Column(dtype="real", range=(-MOST, MOST)) for name in self.features}
        columns["ahead"] = Column(dtype="real", range=ends, role="label")
        return TableSchema(name="epidemic", max_rows=200_000, columns=columns)

    def edges(self, x: Floats) -> dict[str, NDArray[np.float32]]:
        """Quantiles of each feature."""
        cuts = np.arange(1, self.bins) / self.bins
        return {name: tidy(np.quantile(x[:, i], cuts), 0.0) for i, name in enumerate(self.features)}

    def grown(self, x: Floats, y: Floats) -> Trees:
        """Boosted trees, by the growth that ``trees.boosted`` has at every site."""
        from atoll.models import tree_kernels
        from atoll.models.tree_splits import Rules

        schema, found = self.schema, self.edges(x)
        objective = make(self.objective, "ahead", schema)
        bins = Bins(self.features, tuple(found.values()), np.zeros(len(self.features), np.int64))
        codes = np.column_stack([tree_kernels.to_codes(np.ascontiguousarray(column), edges)
                                 for column, edges in zip(x.T, bins.edges, strict=True)])  # fmt: skip
        rules = Rules(
            l2=self.l2, min_rows=LEAST, g_unit=objective.gradient.unit, h_unit=objective.hessian.unit
        )  # fmt: skip
        base, words = Alone(objective, bins, rules, self.num_trees, self.depth, self.rate).grow(codes, y)
        spec = TreesSpec(
            target="ahead", features=self.features, link=objective.link, num_trees=self.num_trees, max_depth=self.depth
        )
        return Trees.of(spec, schema).with_weights(np.concatenate([base, words.ravel()]))

    def __call__(self, x: Floats, y: Floats, new: Floats) -> Floats:
        """What :meth:`grown` trees tell of *new* rows."""
        trees = self.grown(x, y)
        return trees.linked(trees.margins(new.astype(np.float32)))


COUNTS = Learner(FEATURES, "poisson", 60, 3, 0.15, 32, 1.0, ratios=False)
"""Cases from cases, as they are."""
GROWTH = Learner(RATIOS, "squared", 40, 2, 0.1, 254, 30.0, ratios=True)
"""As in ``examples/epidemic/forecast-7.yaml``. Chosen on other provinces: ``docs/epidemic.md``."""


def federated_differs(panel: Panel, at: int, days: int, learner: Learner) -> int:
    """How many weights of the program ``trees.boosted`` at four sites are not those of :meth:`Learner.grown` on pooled
    rows."""
    tables, parts = dict[str, Table](), []
    for k, site in enumerate(SITES):
        x, y = taught(panel, np.flatnonzero(panel.site == k), at, days, learner.ratios)
        parts.append((x, y))
        columns = {name: np.ascontiguousarray(x[:, i]) for i, name in enumerate(learner.features)}
        tables[site] = Table(learner.schema, {**columns, "ahead": y})
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    edges = {name: [float(edge) for edge in found] for name, found in learner.edges(x).items()}
    params = {
        "target": "ahead", "objective": learner.objective, "features": learner.features, "edges": edges,
        "trees": learner.num_trees, "max_depth": learner.depth, "learning_rate": learner.rate, "min_rows": LEAST,
        "l2": learner.l2,
    }  # fmt: skip
    model, _ = driven("trees.boosted", params, tables)
    return int((model.weights != learner.grown(x, y).weights).sum())


def glm(x: Floats, y: Floats, new: Floats) -> Floats:
    """Poisson regression on log(1 + feature), standardised, with scikit-learn's default ridge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), PoissonRegressor(alpha=1.0, max_iter=300)).fit(np.log1p(x), y)
        return np.asarray(np.minimum(model.predict(np.log1p(new)), 10 * max(y.max(), 1.0)))


def taught(panel: Panel, group: Ints, at: int, days: int, ratios: bool) -> tuple[Floats, Floats]:
    """(features [rows, features], target [rows]) of a *group* of units, of the days whose target was over by day *at*:
    the mean of the cases a day, or (*ratios*) its growth from the level."""
    known = slice(0, at - days + 1)
    x, y = (panel.ratios if ratios else panel.features)[group, known], panel.ahead(days)[group, known] / days
    y = growth(y, panel.level[group, known], PLUS) if ratios else y
    return x.reshape(-1, x.shape[-1]), y.ravel()


def learned(panel: Panel, at: int, fit: Fit, together: bool, ratios: bool = False) -> Floats:
    """A model for each horizon, of what is *taught*: of all regions, or of each alone.

    A horizon without such rows yet takes the longest that has some; of growth, no change, until they are of two weeks.
    """
    made, fewest = np.zeros((len(SITES), len(HORIZONS))), FEWEST if ratios else 2
    for h, days in enumerate(HORIZONS):
        known = [d for d in HORIZONS if at - d + 1 >= fewest]
        usable = days if days in known else 0 if ratios else max(known, default=0)
        groups = [np.arange(len(panel.site))] if together else [np.flatnonzero(panel.site == k) for k in range(4)]
        for group in groups:
            told = np.zeros(len(group))
            if usable:
                x, y = taught(panel, group, at, usable, ratios)
                told = fit(x, y, (panel.ratios if ratios else panel.features)[group, at]) if y.any() else told
            if ratios:
                told = (panel.level[group, at] + PLUS) * np.exp(told) - PLUS
            np.add.at(made[:, h], panel.site[group], days * np.maximum(told, 0.0))
    return made


FORECASTERS: Mapping[str, Forecaster] = {
    "persistence": persistence,
    "mean of three days": recent,
    "weekly mean": weekly,
    "ARIMA": arima,
    "ETS": ets,
    "SEIR": mechanistic,
    "trees, local": partial(learned, fit=COUNTS, together=False),
    "trees, federated": partial(learned, fit=COUNTS, together=True),
    "GLM, local": partial(learned, fit=glm, together=False),
    "GLM, federated": partial(learned, fit=glm, together=True),
    "growth trees, local": partial(learned, fit=GROWTH, together=False, ratios=True),
    "growth trees, federated": partial(learned, fit=GROWTH, together=True, ratios=True),
}
