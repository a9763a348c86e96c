"""Trees of pooled rows by each objective, beside XGBoost's.

XGBoost is given the codes of the same bins as its features, and looks for splits exactly, so it can find the same ones.
With the objectives it shares margins are then equal but for its own float32 sums. Two are not the same by design:
quantile leaves come of cells (see the objective), and where durations are tied XGBoost's Cox counts the events of a tie
one after the other, so that is compared without ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from statsmodels.duration.hazard_regression import PHReg

from atoll.contract.schema import Column, TableSchema
from atoll.models import tree_kernels
from atoll.models.tree_splits import Rules
from atoll.models.trees import Trees, TreesSpec
from atoll.trees.alone import Alone
from atoll.trees.binning import Bins, tidy
from atoll.trees.objective import make

xgboost = pytest.importorskip("xgboost")
ROWS, FEATURES, TREES, DEPTH, RATE = 1500, 4, 20, 3, 0.2


@dataclass
class Data:
    """x: [ROWS, FEATURES], some missing. signal: what targets follow, [ROWS]."""

    x: np.ndarray
    signal: np.ndarray
    random: np.random.Generator


@pytest.fixture(scope="module")
def data() -> Data:
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, FEATURES)).round(1)
    signal = 1.5 * x[:, 0] + np.where(x[:, 1] > 0.3, 1, -1) + x[:, 2] * x[:, 3] / 2
    x[random.random(x.shape) < 0.05] = np.nan
    return Data(x, signal, random)


Fitted = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def fit(data: Data) -> Callable[..., Fitted]:
    """(our margins, XGBoost's), [ROWS, outputs]."""
    names = tuple(f"x{j}" for j in range(FEATURES))

    def fitted(asked: Any, columns: dict[str, Column], labels: np.ndarray, theirs: dict[str, Any], y: Any) -> Fitted:
        target = next(iter(columns))
        schema = TableSchema(
            name="t", max_rows=10_000, columns={**{name: Column(range=(-10, 10)) for name in names}, **columns}
        )
        known = [column[~np.isnan(column)] for column in data.x.T]
        bins = Bins(
            names, tuple(tidy(np.quantile(c, np.arange(1, 32) / 32), -10) for c in known), np.zeros(4, np.int64)
        )
        codes = np.column_stack([tree_kernels.to_codes(c, e) for c, e in zip(data.x.T, bins.edges, strict=True)])
        objective = make(asked, target, schema)
        rules = Rules(g_unit=objective.gradient.unit, h_unit=objective.hessian.unit)
        base, words = Alone(objective, bins, rules, TREES, DEPTH, RATE).grow(codes, labels)
        spec = TreesSpec(target=target, features=names, link=objective.link, num_trees=TREES, max_depth=DEPTH)
        model = Trees.of(spec, schema).with_weights(np.concatenate([base, words.ravel()]))
        ours = model.margins(data.x.astype(np.float32))
        seen = xgboost.DMatrix(np.where(codes == 0, np.nan, codes.astype(float)), label=y)
        settings = {"max_depth": DEPTH, "eta": RATE, "tree_method": "exact", "nthread": 1, **theirs}
        beside = xgboost.train(settings, seen, TREES).predict(seen, output_margin=True)
        return ours, beside.reshape(ROWS, -1)

    return fitted


def test_squared(fit: Any, data: Data) -> None:
    y = data.signal + data.random.normal(size=ROWS)
    ours, theirs = fit("squared", {"y": Column(range=(-30, 30), role="label")}, y, {"objective": "reg:squarederror"}, y)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_logistic(fit: Any, data: Data) -> None:
    y = (data.random.random(ROWS) < 1 / (1 + np.exp(-data.signal))).astype(float)
    column = Column(dtype="integer", values=(0, 1), role="label")
    ours, theirs = fit("logistic", {"y": column}, y, {"objective": "binary:logistic"}, y)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_softmax(fit: Any, data: Data) -> None:
    y = np.digitize(data.signal, [-1, 1]).astype(float)
    column = Column(dtype="integer", values=(0, 1, 2), role="label")
    ours, theirs = fit("softmax", {"y": column}, y, {"objective": "multi:softprob", "num_class": 3}, y)
    centred = [margin - margin.mean(axis=1, keepdims=True) for margin in (ours, theirs)]
    np.testing.assert_allclose(*centred, atol=1e-5)


def test_poisson(fit: Any, data: Data) -> None:
    y = data.random.poisson(np.exp(data.signal / 2)).astype(float)
    column = Column(dtype="integer", range=(0, 80), role="label")
    ours, theirs = fit("poisson", {"y": column}, y, {"objective": "count:poisson"}, y)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_quantile(fit: Any, data: Data, alpha: float) -> None:
    y = data.signal + data.random.normal(size=ROWS)
    theirs = {"objective": "reg:quantileerror", "quantile_alpha": alpha, "tree_method": "hist"}
    both = fit({"kind": "quantile", "alpha": alpha}, {"y": Column(range=(-30, 30), role="label")}, y, theirs, y)
    left = [y - margin[:, 0] for margin in both]
    ours, xgboosts = (np.maximum(alpha * e, (alpha - 1) * e).mean() for e in left)
    assert ours < 1.02 * xgboosts
    assert (left[0] <= 0).mean() == pytest.approx(alpha, abs=0.04)


def concordance(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's C: of the pairs whose order is known, those in which the higher risk came first."""
    known = (event[:, None] == 1) & (time[:, None] < time)
    return float((known & (risk[:, None] > risk)).sum() / known.sum())


def test_cox(fit: Any, data: Data) -> None:
    durations = data.random.exponential(50 * np.exp(-data.signal))
    time, event = 1.0 + np.argsort(np.argsort(durations)), (data.random.random(ROWS) < 0.7).astype(float)
    columns = {
        "days": Column(dtype="integer", range=(1, ROWS), role="label"),
        "died": Column(dtype="integer", values=(0, 1), role="label"),
    }
    labels = np.column_stack([time - 1, event])
    asked, wanted = {"kind": "cox", "event": "died"}, np.where(event == 1, time, -time)
    ours, theirs = fit(asked, columns, labels, {"objective": "survival:cox"}, wanted)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    x = np.nan_to_num(data.x)
    linear = PHReg(time, x, status=event).fit().predict(pred_type="lhr").predicted_values
    assert concordance(time, event, ours[:, 0]) > concordance(time, event, np.ravel(linear))
