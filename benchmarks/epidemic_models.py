"""The forecasters of the epidemic backtest. Each sees the panel up to the origin's day, and nothing after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
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
from benchmarks.epidemic_panel import FEATURES, RESIDENTS, SITES, Panel, moving
from benchmarks.learning import driven

Floats = NDArray[np.float64]
HORIZONS = (1, 3, 7, 14)
HISTORY = 120
"""Days that ARIMA, ETS and SEIR are fitted to: the latest."""
NUM_TREES, DEPTH, RATE, BINS, LEAST = 60, 3, 0.15, 32, 20
"""As in ``examples/epidemic/forecast-7.yaml``."""
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


def schema() -> TableSchema:
    """Of the rows that trees learn from: the features, and the mean of the cases a day ahead."""
    number = Column(dtype="real", range=(0, MOST))
    columns = {**dict.fromkeys(FEATURES, number), "ahead": number.model_copy(update={"role": "label"})}
    return TableSchema(name="epidemic", max_rows=200_000, columns=columns)


def edges_of(x: Floats) -> dict[str, NDArray[np.float32]]:
    """Quantiles of each feature."""
    cuts = np.arange(1, BINS) / BINS
    return {name: tidy(np.quantile(x[:, i], cuts), 0.0) for i, name in enumerate(FEATURES)}


def grown(x: Floats, y: Floats) -> Trees:
    """Boosted trees with Poisson loss, by the growth that ``trees.boosted`` has at every site."""
    from atoll.models import tree_kernels
    from atoll.models.tree_splits import Rules

    told, found = schema(), edges_of(x)
    objective = make("poisson", "ahead", told)
    bins = Bins(FEATURES, tuple(found.values()), np.zeros(len(FEATURES), np.int64))
    codes = np.column_stack([tree_kernels.to_codes(np.ascontiguousarray(column), edges)
                             for column, edges in zip(x.T, bins.edges, strict=True)])  # fmt: skip
    rules = Rules(min_rows=LEAST, g_unit=objective.gradient.unit, h_unit=objective.hessian.unit)
    base, words = Alone(objective, bins, rules, NUM_TREES, DEPTH, RATE).grow(codes, y)
    spec = TreesSpec(target="ahead", features=FEATURES, link=objective.link, num_trees=NUM_TREES, max_depth=DEPTH)
    return Trees.of(spec, told).with_weights(np.concatenate([base, words.ravel()]))


def boosted(x: Floats, y: Floats, new: Floats) -> Floats:
    """What :func:`grown` trees tell of *new* rows."""
    return np.asarray(np.exp(grown(x, y).margins(new.astype(np.float32))[:, 0]))


def federated_differs(panel: Panel, at: int, days: int) -> int:
    """How many weights of the program ``trees.boosted`` at four sites are not those of :func:`grown` on pooled rows."""
    width, tables, parts = len(FEATURES), dict[str, Table](), []
    for k, site in enumerate(SITES):
        group = np.flatnonzero(panel.site == k)
        x = panel.features[group, : at - days + 1].reshape(-1, width)
        y = panel.ahead(days)[group, : at - days + 1].ravel() / days
        parts.append((x, y))
        columns = {name: np.ascontiguousarray(x[:, i]) for i, name in enumerate(FEATURES)}
        tables[site] = Table(schema(), {**columns, "ahead": y})
    x, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    edges = {name: [float(edge) for edge in found] for name, found in edges_of(x).items()}
    params = {
        "target": "ahead", "objective": "poisson", "features": FEATURES, "edges": edges, "trees": NUM_TREES,
        "max_depth": DEPTH, "learning_rate": RATE, "min_rows": LEAST,
    }  # fmt: skip
    model, _ = driven("trees.boosted", params, tables)
    return int((model.weights != grown(x, y).weights).sum())


def glm(x: Floats, y: Floats, new: Floats) -> Floats:
    """Poisson regression on log(1 + feature), standardised, with scikit-learn's default ridge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_pipeline(StandardScaler(), PoissonRegressor(alpha=1.0, max_iter=300)).fit(np.log1p(x), y)
        return np.asarray(np.minimum(model.predict(np.log1p(new)), 10 * max(y.max(), 1.0)))


def learned(panel: Panel, at: int, fit: Fit, together: bool) -> Floats:
    """A model for each horizon, of the rows whose target was over by day *at*: of all regions, or of each alone.

    The target is the mean a day over the horizon. A horizon without such rows yet takes the longest that has some.
    """
    made = np.zeros((len(SITES), len(HORIZONS)))
    for h, days in enumerate(HORIZONS):
        usable = days if at - days >= 1 else max((d for d in HORIZONS if at - d >= 1), default=0)
        groups = [np.arange(len(panel.site))] if together else [np.flatnonzero(panel.site == k) for k in range(4)]
        for group in groups:
            new = panel.features[group, at]
            told = np.zeros(len(group))
            if usable:
                x = panel.features[group, : at - usable + 1].reshape(-1, new.shape[1])
                y = panel.ahead(usable)[group, : at - usable + 1].ravel() / usable
                told = fit(x, y, new) if y.any() else told
            np.add.at(made[:, h], panel.site[group], days * np.maximum(told, 0.0))
    return made


FORECASTERS: Mapping[str, Forecaster] = {
    "persistence": persistence,
    "weekly mean": weekly,
    "ARIMA": arima,
    "ETS": ets,
    "SEIR": mechanistic,
    "trees, local": partial(learned, fit=boosted, together=False),
    "trees, federated": partial(learned, fit=boosted, together=True),
    "GLM, local": partial(learned, fit=glm, together=False),
    "GLM, federated": partial(learned, fit=glm, together=True),
}
