"""Trees of pooled rows by each objective, beside XGBoost's.

XGBoost is given the codes of the same bins as its features, and looks for splits exactly, so it can find the same ones.
With the objectives it shares margins are then equal but for its own float32 sums. Two are not the same by design:
quantile leaves come of cells (see the objective), and where durations are tied XGBoost's Cox counts the events of a tie
one after the other, so that is compared without ties.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from statsmodels.duration.hazard_regression import PHReg

from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import tree_kernels
from atoll.models.tree_splits import Rules
from atoll.models.trees import FEATURE, THRESHOLD, Trees, TreesSpec
from atoll.trees.alone import Alone
from atoll.trees.binning import Bins, tidy
from atoll.trees.objective import make
from atoll.trees.weighted import Weighted

from .boosted_rows import steps

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

    def fitted(
        asked: Any, columns: dict[str, Column], labels: np.ndarray, theirs: dict[str, Any], y: Any, weights: Any = None,
        offset: np.ndarray | None = None,
    ) -> Fitted:  # fmt: skip
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
        if weights is not None:
            objective, labels = Weighted.of(objective, "w", schema), np.column_stack([labels, weights])
        least = theirs.get("min_child_weight", 1.0)
        rules = Rules(min_child_weight=least, g_unit=objective.gradient.unit, h_unit=objective.hessian.unit)
        base, words = Alone(objective, bins, rules, TREES, DEPTH, RATE).grow(codes, labels)
        spec = TreesSpec(target=target, features=names, link=objective.link, num_trees=TREES, max_depth=DEPTH)
        model = Trees.of(spec, schema).with_weights(np.concatenate([base, words.ravel()]))
        ours = model.margins(data.x.astype(np.float32))
        seen = xgboost.DMatrix(np.where(codes == 0, np.nan, codes.astype(float)), label=y, weight=weights)
        if offset is not None:
            ours = ours + offset[:, None]
            seen.set_base_margin(offset + base)
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


WEIGHT = {"w": Column(range=(0, 3))}


def weights_of(data: Data) -> np.ndarray:
    return np.where(np.arange(ROWS) % 10 == 0, 0.0, data.random.uniform(0.2, 3, ROWS))


def test_squared_with_weights(fit: Any, data: Data) -> None:
    y, columns = data.signal + data.random.normal(size=ROWS), {"y": Column(range=(-30, 30), role="label"), **WEIGHT}
    w = weights_of(data)
    ours, theirs = fit("squared", columns, y, {"objective": "reg:squarederror", "min_child_weight": 20}, y, w)
    np.testing.assert_allclose(ours[w > 0], theirs[w > 0], atol=1e-5)
    assert np.abs(ours - fit("squared", columns, y, {"objective": "reg:squarederror"}, y)[0]).max() > 0.05


def test_logistic_with_weights(fit: Any, data: Data) -> None:
    y = (data.random.random(ROWS) < 1 / (1 + np.exp(-data.signal))).astype(float)
    columns = {"y": Column(dtype="integer", values=(0, 1), role="label"), **WEIGHT}
    w = weights_of(data)
    ours, theirs = fit("logistic", columns, y, {"objective": "binary:logistic"}, y, w)
    np.testing.assert_allclose(ours[w > 0], theirs[w > 0], atol=1e-5)


def test_softmax_with_weights(fit: Any, data: Data) -> None:
    y = np.digitize(data.signal, [-1, 1]).astype(float)
    columns = {"y": Column(dtype="integer", values=(0, 1, 2), role="label"), **WEIGHT}
    theirs, w = {"objective": "multi:softprob", "num_class": 3}, weights_of(data)
    both = fit("softmax", columns, y, theirs, y, w)
    centred = [(margin - margin.mean(axis=1, keepdims=True))[w > 0] for margin in both]
    np.testing.assert_allclose(*centred, atol=1e-5)  # where no weight is, a threshold may be anywhere


@pytest.mark.parametrize("weighted", [False, True])
def test_poisson_with_an_exposure(fit: Any, data: Data, weighted: bool) -> None:
    years = data.random.uniform(0.1, 5, ROWS)
    y = data.random.poisson(years * np.exp(data.signal / 2)).astype(float)
    columns = {"y": Column(dtype="integer", range=(0, 400), role="label"), "years": Column(range=(0, 5)), **WEIGHT}
    asked, theirs = {"kind": "poisson", "exposure": "years"}, {"objective": "count:poisson"}
    labels, w = np.column_stack([y, years]), weights_of(data) if weighted else np.ones(ROWS)
    ours, beside = fit(asked, columns, labels, theirs, y, w if weighted else None, np.log(years))
    np.testing.assert_allclose(ours[w > 0], beside[w > 0], atol=1e-5)


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


# ---------------------------------------------------------------- the federation's trees


def test_its_splits_are_xgboosts_where_the_bins_are(federation: Any, drive: Any) -> None:
    """Few distinct values have a bin each on both sides."""
    random = np.random.default_rng(3)
    x = random.integers(0, 12, (900, 3)).astype(float)
    x[random.random(x.shape) < 0.1] = np.nan
    signal = np.nan_to_num(x[:, 0]) - 5 + np.where(np.nan_to_num(x[:, 1]) > 4, 2, -2) + random.normal(0, 1, 900)
    y = (signal > 0).astype(float)
    columns = {f"x{j}": {"dtype": "integer", "range": [0, 11]} for j in range(3)}
    columns["y"] = {"dtype": "integer", "values": [0, 1], "role": "label"}
    tables = {
        f"s{i}": federation.table({**{f"x{j}": x[i::3, j] for j in range(3)}, "y": y[i::3]}, columns) for i in range(3)
    }
    params = {"target": "y", "trees": 5, "max_depth": 3, "learning_rate": 0.3, "min_rows": 1}
    model = drive(steps(params, tables), tables).result["model"]
    settings = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 3, "eta": 0.3, "nthread": 1,
                "base_score": float(y.mean())}  # fmt: skip
    booster = xgboost.train(settings, xgboost.DMatrix(x, y), 5)
    for words, tree in zip(model.words, booster.get_dump(dump_format="json"), strict=True):
        compared(words, 0, json.loads(tree))
    ours = np.concatenate([model.predict(tables[f"s{i}"]) for i in range(3)])
    theirs = np.concatenate([booster.predict(xgboost.DMatrix(x[i::3])) for i in range(3)])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def compared(words: np.ndarray, at: int, node: Mapping[str, Any]) -> None:
    """A node of ours and one of XGBoost's, and what is below; where no cell is missing, either way is right."""
    if "leaf" in node:
        assert words[at, FEATURE] == -1
        assert words[at, THRESHOLD] == pytest.approx(node["leaf"], abs=1e-5)
        return
    assert words[at, FEATURE] == int(node["split"].removeprefix("f"))
    assert words[at, THRESHOLD] == pytest.approx(node["split_condition"])
    for below, child in zip((2 * at + 1, 2 * at + 2), (node["yes"], node["no"]), strict=True):
        compared(words, below, next(c for c in node["children"] if c["nodeid"] == child))


@pytest.mark.slow
def test_its_auc_is_xgboosts_on_three_banks(federation: Any, atoll_data: Path) -> None:
    """With the same bins: each column's values are put on 200 of its quantiles before."""
    metrics = pytest.importorskip("sklearn.metrics")
    folder = atoll_data / "default-credit-uci"

    def read(name: str) -> np.ndarray:
        with gzip.open(folder / f"default_credit_homo_{name}.csv.gz", "rt") as file:
            return np.loadtxt(file, delimiter=",", skiprows=1)[:, 1:]

    parts, test = [read(name) for name in ("guest", "host_1", "host_2")], read("test")
    train = np.concatenate(parts)
    for j in range(1, train.shape[1]):
        levels = np.unique(np.quantile(train[:, j], np.linspace(0, 1, 200)).astype(np.float32)).astype(float)
        for part in (*parts, test, train):
            part[:, j] = levels[np.clip(np.searchsorted(levels, part[:, j], "right") - 1, 0, None)]
    names = [f"x{j}" for j in range(train.shape[1] - 1)]
    columns = {n: {"range": [float(c.min()), float(c.max())]} for n, c in zip(names, train[:, 1:].T, strict=True)}
    columns["y"] = {"dtype": "integer", "values": [0, 1], "role": "label"}

    def table(rows: np.ndarray) -> Table:
        return federation.table({"y": rows[:, 0], **dict(zip(names, rows[:, 1:].T, strict=True))}, columns)

    tables = {f"bank{i}": table(part) for i, part in enumerate(parts)}
    params = {"target": "y", "trees": 40, "max_depth": 4, "learning_rate": 0.1}
    outcome = federation.run(federation.plan("trees.boosted", params, tables, protection="secagg"), tables)
    ours = metrics.roc_auc_score(test[:, 0], outcome["result"]["model"].predict(table(test)))
    settings = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": 4, "eta": 0.1, "max_bin": 256}
    booster = xgboost.train(settings, xgboost.DMatrix(train[:, 1:], train[:, 0]), 40)
    theirs = metrics.roc_auc_score(test[:, 0], booster.predict(xgboost.DMatrix(test[:, 1:])))
    assert abs(ours - theirs) <= 0.0005
