"""Trees that a federation grew, in XGBoost: every row comes to the same leaf, and margins and SHAP values are equal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from atoll.contract.program import Cohort, build
from atoll.data.table import Table
from atoll.models import shap, tree_kernels, xgboost_reading
from atoll.models.trees import UNUSED
from atoll.models.xgboost_json import to_json

xgboost = pytest.importorskip("xgboost")

COLUMNS: dict[str, dict[str, Any]] = {
    "age": {"range": [0, 100]},
    "dose": {"range": [-1, 1]},
    "place": {"dtype": "text", "values": ["isles", "coast", "hills"]},
    "grade": {"dtype": "integer", "values": [3, 1, 2]},
    "cost": {"range": [0, 1e6], "role": "label"},
    "ill": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "kind": {"dtype": "text", "values": ["x", "y", "z"], "role": "label"},
    "cases": {"dtype": "integer", "range": [0, 200], "role": "label"},
}
FEATURES = ["age", "dose", "place", "grade"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "squared": ("cost", {}),
    "logistic": ("ill", {"monotone": {"dose": 1}, "colsample": 0.75}),
    "softmax": ("kind", {}),
    "poisson": ("cases", {}),
    "quantile": ("cost", {"objective": {"kind": "quantile", "alpha": 0.8}}),
    "cox": ("cases", {"objective": {"kind": "cox", "event": "ill"}}),
}


def tables_of(federation: Any) -> dict[str, Table]:
    random, found = np.random.default_rng(5), {}
    for i, n in enumerate((150, 90, 120)):
        age, dose = np.round(random.uniform(0, 100, n), 1), random.uniform(-1, 1, n)
        place = random.choice(np.array(["isles", "coast", "hills"], object), n)
        grade = random.choice([1.0, 2, 3], n)
        eta = age / 40 - 1 + dose + (place == "coast") - (grade == 3)
        data: dict[str, Any] = {
            "age": age, "dose": dose, "place": place, "grade": grade,
            "cost": np.clip(2e5 * (eta + 2) + random.normal(0, 2e4, n), 0, 1e6),
            "ill": (random.random(n) < 1 / (1 + np.exp(-eta))).astype(float),
            "kind": np.array(["x", "y", "z"], object)[np.clip(np.round(eta), 0, 2).astype(int)],
            "cases": np.minimum(random.poisson(np.exp(eta)), 200).astype(float),
        }  # fmt: skip
        for name, gone in (("age", np.nan), ("dose", np.nan), ("grade", np.nan), ("place", None)):
            data[name][random.random(n) < 0.1] = gone
        found[f"s{i}"] = federation.table(data, COLUMNS)
    return found


def pooled(tables: Mapping[str, Table]) -> Table:
    first = next(iter(tables.values()))
    return Table(first.schema, {n: np.concatenate([t[n] for t in tables.values()]) for n in first.columns})


@pytest.mark.parametrize("objective", CASES)
def test_xgboost_predicts_the_same(federation: Any, drive: Any, tmp_path: Path, objective: str) -> None:
    target, more = CASES[objective]
    tables = tables_of(federation)
    params = {"target": target, "features": FEATURES, "categorical": ["place", "grade"], "trees": 6, "max_depth": 4,
              "max_bins": 32, "objective": objective, **more}  # fmt: skip
    schema = tables["s0"].schema
    model = drive(build("trees.boosted", params).coordinate(Cohort(tuple(tables), schema, seed=2)), tables).result[
        "model"
    ]
    table = pooled(tables)
    (tmp_path / "model.json").write_bytes(to_json(model, schema, objective))
    booster = xgboost.Booster(params={"nthread": 1}, model_file=tmp_path / "model.json")
    data = pd.DataFrame({"age": table["age"], "dose": table["dose"]})
    for name in ("place", "grade"):
        values = schema.columns[name].values
        data[name] = pd.Categorical.from_codes(table.codes(name), list(values or ())).reorder_categories(sorted(values))
    matrix = xgboost.DMatrix(data, enable_categorical=True, nthread=1)
    inputs = model.inputs(table)
    leaves = tree_kernels.leaf_of(inputs, *model.nodes[:4])
    theirs = booster.predict(matrix, pred_leaf=True).reshape(leaves.shape)
    for t, tree in enumerate(model.words):
        assert ((np.cumsum(tree[:, 0] != UNUSED) - 1)[leaves[:, t]] == theirs[:, t]).all()
    assert (model.nodes.feature >= 0).sum() > 30
    size = np.abs(model.base).max() + np.abs(model.nodes.value).max(axis=1).sum()
    margins, ours = booster.predict(matrix, output_margin=True).reshape(len(table), -1), model.margins(inputs)
    assert np.abs(margins - ours).max() <= 1e-6 * size
    assert np.abs(booster.predict(matrix) - model.predict(table)).max() <= 1e-6 * size * max(1, ours.max())
    values, expected = shap.shap_values(model, inputs)
    found = booster.predict(matrix, pred_contribs=True, strict_shape=True)
    assert np.abs(found[:, :, :-1] - values).max() <= 1e-5 * size
    assert np.abs(found[:, :, -1] - expected).max() <= 1e-5 * size
    again, _ = xgboost_reading.from_json(bytes(booster.save_raw("json")), schema, target)
    assert np.abs(again.margins(inputs) - ours).max() <= 1e-6 * size
