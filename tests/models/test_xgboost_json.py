"""Models of trees as XGBoost's files: the same leaf for every row there and here, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.models import xgboost_json, xgboost_reading
from atoll.models.trees import Trees, TreesSpec

from .random_trees import (
    FEATURES,
    OF_LINK,
    SCHEMA,
    TARGETS,
    assert_alike,
    booster,
    drawn,
    frame,
    matrix,
    rows,
    size,
    xgboost,
)


@pytest.mark.parametrize("link", TARGETS)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=4)
def test_xgboost_predicts_what_the_model_does(
    link: str, tmp_path_factory: Any, seed: int, trees: int, depth: int
) -> None:
    model = drawn(link, trees, depth, seed)
    table = rows(300, seed, model)
    objective = OF_LINK[link][seed % len(OF_LINK[link])]
    content = xgboost_json.to_json(model, SCHEMA, objective)
    found = booster(content, tmp_path_factory.mktemp("xgboost"))
    assert_alike(model, found, table)
    assert json.loads(found.save_config())["learner"]["objective"]["name"] == xgboost_json.NAMES[objective]
    again, told = xgboost_reading.from_json(content, SCHEMA, TARGETS[link])
    assert told == xgboost_json.NAMES[objective]
    inputs = model.inputs(table)
    assert np.abs(again.margins(inputs) - model.margins(inputs)).max() <= 1e-6 * size(model)
    assert xgboost_json.to_json(again, SCHEMA, told) == content
    theirs, _ = xgboost_reading.from_json(bytes(found.save_raw("json")), SCHEMA, TARGETS[link])
    assert theirs.weights.tobytes() == again.weights.tobytes()


@pytest.mark.parametrize("margin", [-90.0, -20.0, -3.3, -1e-8, 0.0, 0.1, 2.0, 5.0, 12.0, 60.0])
@pytest.mark.parametrize("link", ["identity", "logistic", "exp"])
def test_any_base_margin_is_had_back(link: str, margin: float, tmp_path: Path) -> None:
    """Where XGBoost's own base score could not say it in float32, the first tree's leaves do."""
    model = drawn(link, 2, 2, 1)
    model = model.with_weights(np.concatenate([[margin], model.weights[1:]]))
    table = rows(50, 1, model)
    content = xgboost_json.to_json(model, SCHEMA)
    assert_alike(model, booster(content, tmp_path), table)
    again, told = xgboost_reading.from_json(content, SCHEMA, TARGETS[link])
    assert xgboost_json.to_json(again, SCHEMA, told) == content


def test_classes_may_have_unequal_base_margins(tmp_path: Path) -> None:
    model = drawn("softmax", 3, 3, 4)
    model = model.with_weights(np.concatenate([[-4.0, 0.25, 7.0], model.weights[3:]]))
    assert_alike(model, booster(xgboost_json.to_json(model, SCHEMA), tmp_path), rows(100, 4, model))


@pytest.mark.parametrize("objective", xgboost_json.LINKS)
def test_every_objective_that_is_read_is_written_again(objective: str, tmp_path: Path) -> None:
    link = xgboost_json.LINKS[objective]
    model = drawn(link, 2, 2, 3)
    found = booster(xgboost_json.to_json(model, SCHEMA, objective), tmp_path)
    assert json.loads(found.save_config())["learner"]["objective"]["name"] == objective
    assert xgboost_reading.from_json(bytes(found.save_raw("json")), SCHEMA, TARGETS[link])[1] == objective


def test_names_that_xgboost_does_not_take_are_left_out(tmp_path: Path) -> None:
    schema = TableSchema(name="odd", columns={"a<1": Column(range=(0, 1)), "y": Column(range=(0, 1), role="label")})
    spec = {"kind": "trees", "features": ["a<1"], "target": "y", "link": "identity", "num_trees": 1, "max_depth": 1}
    model = Trees.of(TreesSpec.model_validate(spec), schema)
    found = booster(xgboost_json.to_json(model, schema), tmp_path)
    assert found.predict(xgboost.DMatrix(np.zeros((2, 1)), nthread=1)).tolist() == [0, 0]


def test_scores_of_isolation_have_no_objective() -> None:
    spec = {"kind": "trees", "features": ["a"], "target": "y", "link": "isolation", "num_trees": 1, "max_depth": 1}
    with pytest.raises(PlanError) as caught:
        xgboost_json.to_json(Trees.of(TreesSpec.model_validate(spec), SCHEMA), SCHEMA)
    assert caught.value.code == "export.no-objective"


# ---------------------------------------------------------------- models that XGBoost trained


def trained(objective: str, table: Table, label: np.ndarray, **params: Any) -> Any:
    features = ["a", "size", "b", "grade"]
    data = xgboost.DMatrix(frame(table, features, shuffled=True), label, enable_categorical=True, nthread=1)
    asked = {"objective": objective, "max_depth": 5, "nthread": 1, "seed": 1, **params}
    return xgboost.train(asked, data, params.get("rounds", 12))


CASES: dict[str, dict[str, Any]] = {
    "reg:squarederror": {}, "reg:absoluteerror": {}, "reg:quantileerror": {"quantile_alpha": 0.8},
    "binary:logistic": {}, "multi:softprob": {"num_class": 3, "num_parallel_tree": 2}, "count:poisson": {},
    "survival:cox": {}, "reg:gamma": {"tree_method": "exact", "max_cat_to_onehot": 9}, "reg:tweedie": {},
    "multi:softmax": {"num_class": 3, "grow_policy": "lossguide", "max_leaves": 9, "max_depth": 0},
    "reg:logistic": {"max_cat_to_onehot": 1, "subsample": 0.7, "colsample_bytree": 0.7, "gamma": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("objective", CASES)
def test_what_xgboost_trained_predicts_here_as_there(objective: str, tmp_path: Path) -> None:
    """Its categories are in another order than the schema's; values at thresholds; missing cells."""
    random, link = np.random.default_rng(8), xgboost_json.LINKS[objective]
    table = rows(800, 8)
    eta = np.nan_to_num(table["a"]) / 3 + (table.codes("size") == 1) - (table.codes("grade") == 2)
    labels = {
        "identity": eta * 100, "logistic": random.random(800) < 1 / (1 + np.exp(-eta)),
        "softmax": np.clip(np.round(eta + random.normal(0, 0.5, 800)), 0, 2), "exp": 1.0 + random.poisson(np.exp(eta)),
    }  # fmt: skip
    params = dict(CASES[objective])
    if params.get("tree_method") == "exact":  # it knows no categories
        table = Table(SCHEMA, {**table.columns, "size": np.full(800, None, object), "grade": np.full(800, np.nan)})
        params["tree_method"] = "hist"
    found = trained(objective, table, labels[link].astype(float), **params)
    content = bytes(found.save_raw("json"))
    model, told = xgboost_reading.from_json(content, SCHEMA, TARGETS[link])
    assert told == objective
    seen = rows(500, 9, model)
    data = matrix(seen, FEATURES, shuffled=True)
    margins = found.predict(data, output_margin=True).reshape(500, -1)
    assert np.abs(margins - model.margins(model.inputs(seen))).max() <= 1e-6 * size(model)
    if objective not in ("multi:softmax",):
        assert found.predict(data) == pytest.approx(model.predict(seen), rel=2e-6 * size(model), abs=1e-6)
    again = booster(xgboost_json.to_json(model, SCHEMA, told), tmp_path)
    assert np.abs(again.predict(data, output_margin=True).reshape(500, -1) - margins).max() <= 2e-6 * size(model)


def test_real_records_with_categories_and_missing_cells(atoll_data: Path) -> None:
    """Heart disease, four hospitals' columns: many missing cells, categories by number."""
    names = ["age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca"]
    names += ["thal", "num"]
    path = atoll_data / "heart-disease-uci" / "processed.hungarian.data"
    records = pd.read_csv(path, names=names, na_values="?")
    codes = {"cp": (1, 2, 3, 4), "restecg": (0, 1, 2), "thal": (3, 6, 7), "slope": (1, 2, 3)}
    columns = {
        name: Column(dtype="integer", values=codes[name]) if name in codes else Column(range=(-1000, 1000))
        for name in names[:-1]
    }
    schema = TableSchema(name="heart", columns={**columns, "ill": Column(dtype="integer", values=(0, 1), role="label")})
    data = {name: records[name].to_numpy(float) for name in names[:-1]}
    table = Table(schema, data)
    given = pd.DataFrame(data)
    for name, values in codes.items():
        given[name] = pd.Categorical(records[name].astype("Int64"), categories=list(values))
    label = (records["num"] > 0).to_numpy(float)
    taught = xgboost.DMatrix(given, label, enable_categorical=True, nthread=1)
    found = xgboost.train({"objective": "binary:logistic", "max_cat_to_onehot": 2, "nthread": 1}, taught, 20)
    model, _ = xgboost_reading.from_json(bytes(found.save_raw("json")), schema, "ill")
    assert sorted(model.settings.categorical) == sorted(codes)
    assert found.predict(taught, output_margin=True) == pytest.approx(
        model.margins(model.inputs(table))[:, 0], abs=2e-6
    )
