"""Preparation recipes: fitted on federated statistics, the same at every site as on pooled rows."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.table import concatenate

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [0, 100]},
    "b": {"range": [-10, 10]},
    "c": {"dtype": "integer", "values": [1, 2, 4]},
    "t": {"dtype": "text"},
    "gone": {"role": "ignore"},
}
NAN = float("nan")


def schema_of(columns: dict[str, Any] = COLUMNS) -> TableSchema:
    return TableSchema(name="test", columns={name: Column(**column) for name, column in columns.items()})


def prepared(*steps: dict[str, Any]) -> Prepared:
    return Prepared(Recipe(steps=steps))


def rows(federation: Any, **data: Any) -> Any:
    n = len(next(iter(data.values())))
    blank = {"a": [NAN] * n, "b": [NAN] * n, "c": [NAN] * n, "t": [None] * n}
    return federation.table({**blank, **data}, COLUMNS)


THRESHOLD = {"step": "threshold", "column": "a", "above": 50, "into": "high"}
IMPUTE = {"step": "impute", "columns": ["a"], "with": "mean"}


def test_threshold(federation: Any) -> None:
    table = prepared(THRESHOLD).apply(rows(federation, a=[0, 50, 50.0001, NAN]), {})
    assert np.array_equal(table["high"], [0, 0, 1, NAN], equal_nan=True)
    assert "a" not in table.columns
    assert "a" not in table.schema.columns
    assert table.schema.columns["high"].bounds() == (0, 1)
    assert table.schema == prepared(THRESHOLD).schema(schema_of())


def test_threshold_keeps_what_the_column_was_for() -> None:
    columns = {**COLUMNS, "a": {"range": [0, 100], "role": "label", "missing": "forbid"}}
    made = prepared(THRESHOLD).schema(schema_of(columns)).columns["high"]
    assert (made.role, made.missing, made.values) == ("label", "forbid", (0, 1))


def test_impute_fills_with_what_was_fitted(federation: Any) -> None:
    recipe = prepared({"step": "impute", "columns": ["a", "c"], "with": "mean"})
    table = rows(federation, a=[1, NAN, 3], c=[NAN, 1, 2])
    found = {"a": {"count": 5, "mean": 7.25}, "c": {"count": 5, "mean": 1.5}}
    view = {"0": recipe.fit([0], {n: {"columns": found} for n in recipe.needs([0])})["0"]}
    json.dumps(view)  # it travels
    filled = recipe.apply(table, view)
    assert filled["a"].tolist() == [1, 7.25, 3]
    assert filled["c"].tolist() == [1.5, 1, 2]
    assert np.isnan(table["a"][1])  # the site's own table is left alone
    after = filled.schema.columns
    assert (after["a"].missing, after["a"].range) == ("forbid", (0, 100))
    assert (after["c"].dtype, after["c"].values, after["c"].bounds()) == ("real", None, (1, 4))


def test_a_step_that_is_not_fitted_stops_the_recipe(federation: Any) -> None:
    recipe = prepared({**THRESHOLD, "column": "b", "into": "first"}, IMPUTE, {**THRESHOLD, "into": "second"})
    table = recipe.apply(rows(federation, a=[1, 99], b=[-1, 60]), {})
    assert "first" in table.columns
    assert "second" not in table.columns


@pytest.mark.parametrize(
    ("steps", "stages"),
    [
        ([], []),
        ([THRESHOLD], [[0]]),
        ([IMPUTE], [[0]]),
        ([THRESHOLD, {**IMPUTE, "columns": ["high"]}], [[0, 1]]),
        ([IMPUTE, {**IMPUTE, "columns": ["b"]}], [[0, 1]]),
        ([IMPUTE, {**IMPUTE, "columns": ["b", "a"]}], [[0], [1]]),
        ([IMPUTE, THRESHOLD], [[0, 1]]),
        ([IMPUTE, THRESHOLD, {**IMPUTE, "columns": ["high"]}], [[0, 1], [2]]),
        ([IMPUTE, {**THRESHOLD, "column": "b"}, {**IMPUTE, "columns": ["high"]}], [[0, 1], [2]]),
    ],
)
def test_stages_fetch_statistics_only_of_columns_that_are_there(steps: list[Any], stages: list[list[int]]) -> None:
    assert prepared(*steps).stages() == stages


@pytest.mark.parametrize(
    ("step", "code", "field"),
    [
        ({"step": "standardise"}, "recipe.unknown-step", "standardise"),
        ({"step": "impute", "columns": []}, "plan.bad-value", "columns"),
        ({"step": "impute", "column": ["a"]}, "plan.invalid", "column"),
        ({**THRESHOLD, "column": "aa"}, "recipe.no-column", "aa"),
        ({**THRESHOLD, "column": "gone"}, "recipe.no-column", "gone"),
        ({**THRESHOLD, "column": "t"}, "recipe.not-numeric", "t"),
        ({**THRESHOLD, "into": "b"}, "recipe.column-exists", "b"),
        ({**IMPUTE, "columns": ["a", "t"]}, "recipe.not-numeric", "t"),
        ({**IMPUTE, "columns": ["gone"]}, "recipe.no-column", "gone"),
    ],
)
def test_recipes_that_cannot_work_are_refused_without_data(step: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(PlanError) as caught:
        prepared(step).schema(schema_of())
    assert caught.value.code == code
    assert field in caught.value.field


def test_nothing_to_impute_from_is_an_error() -> None:
    recipe = prepared({**IMPUTE, "columns": ["a", "b"]})
    found = {"columns": {"a": {"count": 3, "mean": 1.0}, "b": {"count": 0, "mean": NAN}}}
    with pytest.raises(PlanError) as caught:
        recipe.fit([0], dict.fromkeys(recipe.needs([0]), found))
    assert (caught.value.code, caught.value.field) == ("recipe.nothing-to-impute", "b")


@pytest.mark.parametrize(
    "steps",
    [
        [IMPUTE, {**THRESHOLD, "column": "b", "above": 0}, {**IMPUTE, "columns": ["high"]}],
        [THRESHOLD, {**IMPUTE, "columns": ["b", "high"]}],
        [IMPUTE, {**IMPUTE, "columns": ["a", "b"]}, {**THRESHOLD, "above": 40}],
    ],
)
def test_a_federated_recipe_equals_the_pooled_one(federation: Any, steps: list[Any]) -> None:
    """Two stages, a threshold before and after fitting, held-out rows that must not be looked at."""
    random = np.random.default_rng(5)

    def site(n: int, center: float) -> Any:
        a = np.where(random.random(n) < 0.3, NAN, np.clip(random.normal(center, 20, n), 0, 100))
        b = np.where(random.random(n) < 0.3, NAN, np.clip(random.normal(center / 20, 3, n), -10, 10))
        c = np.where(random.random(n) < 0.2, NAN, random.choice([1, 2, 4], n))
        return rows(federation, a=a, b=b, c=c)

    tables = {"one": site(40, 20), "two": site(90, 80), "three": site(8, 50)}
    plan = federation.plan(
        "statistics.describe", {}, tables, recipe={"steps": steps}, run={"holdout": 0.25, "seed": 3, "evaluate": False}
    )
    outcome = federation.run(plan, tables)
    split = {name: SiteData.of(table, plan, name) for name, table in tables.items()}
    pooled = concatenate([data.parts(outcome["fitted"])[0] for data in split.values()])
    described = outcome["result"]["columns"]
    assert set(described) == set(pooled.schema.numeric_columns())
    for name, found in described.items():
        values = pooled[name][~np.isnan(pooled[name])]
        assert found["count"] == len(values)
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
    # the recipe by hand, on pooled training rows
    training = concatenate([tables[name].rows(~data.base().held_out) for name, data in split.items()])
    columns = {n: v.copy() for n, v in training.columns.items()}
    for step in steps:
        if step["step"] == "threshold":
            source = columns.pop(step["column"])
            columns[step["into"]] = np.where(np.isnan(source), NAN, source > step["above"])
        else:
            for name in step["columns"]:
                columns[name] = np.where(np.isnan(columns[name]), np.nanmean(columns[name]), columns[name])
    for name in pooled.schema.numeric_columns():
        assert np.allclose(pooled[name], columns[name], rtol=1e-12, atol=0, equal_nan=True)
