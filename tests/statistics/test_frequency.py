"""Frequency tables and histograms equal the pooled rows' counts; small cells are withheld or merged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "grade": {"dtype": "text", "values": ["a", "b", "c", "only at s1"]},
    "level": {"dtype": "integer", "values": [3, 1, 2]},
    "x": {"range": [-5, 5]},
    "constant": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "free": {"dtype": "text"},
}
STRICT = Policy.sandbox().model_copy(update={"min_group_size": 5})


def sites(federation: Any, seed: int, sizes: list[int], holes: float = 0.2) -> dict[str, Any]:
    random, tables = np.random.default_rng(seed), {}
    for i, n in enumerate(sizes):
        grade = random.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1]).astype(object)
        if i == 1:
            grade[: n // 2] = "only at s1"
        grade[random.random(n) < holes] = None
        data = {
            "grade": grade,
            "level": random.choice([1.0, 2.0, NAN], n),
            "x": np.where(random.random(n) < holes, NAN, random.normal(i, 1, n).clip(-5, 5)),
            "constant": np.full(n, 3.0),
            "empty": np.full(n, NAN),
            "free": [None] * n,
        }
        tables[f"s{i}"] = federation.table(data, COLUMNS)
    return tables


def frequency(drive: Any, tables: dict[str, Any], smallest: int = 1, at_sites: int | None = None, **params: Any) -> Any:
    schema = next(iter(tables.values())).schema
    steps = build("statistics.frequency", params).coordinate(Cohort(tuple(tables), schema, 0, smallest))
    driven = drive(steps, tables, rule=Rule(smallest if at_sites is None else at_sites))
    assert len(driven.rounds) == 1
    return driven.result["frequency"]["columns"]


def pooled_bins(tables: dict[str, Any], name: str, edges: Any, smallest: int = 1) -> Any:
    columns = [t[name][~np.isnan(t[name])] for t in tables.values()]
    values = np.concatenate([column for column in columns if len(column) >= smallest])
    return pd.cut(values, edges, include_lowest=True).value_counts().tolist()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 6, 50, 300]), min_size=1, max_size=4),
    smallest=st.sampled_from([1, 5]),
    at_sites=st.sampled_from([1, 5]),
)
def test_equals_pandas_on_pooled_rows(
    federation: Any, drive: Any, seed: int, sizes: list[int], smallest: int, at_sites: int
) -> None:
    tables = sites(federation, seed, sizes)
    at_sites = min(at_sites, smallest)
    found = frequency(drive, tables, smallest, at_sites, edges={"constant": [1, 3, 4]})
    rows = concatenate(list(tables.values()))
    assert list(found) == [name for name in COLUMNS if name != "free"]
    for name in ("grade", "level"):
        series = pd.Series(rows[name])
        wanted = [int((series == value).sum()) for value in COLUMNS[name]["values"]] + [int(series.isna().sum())]
        told = [*found[name]["counts"], found[name]["missing"]]
        assert all(t == w for t, w in zip(told, wanted, strict=True) if t is not None)
        assert all(t == 0 or t >= smallest for t in told if t is not None)
        if smallest == 1:
            assert None not in told
        elif told.count(None):
            assert sum(w for t, w in zip(told, wanted, strict=True) if t is None) >= min(smallest, len(rows))
    for name in ("x", "constant", "empty"):
        column = found[name]
        if column["counts"]:
            assert column["counts"] == pooled_bins(tables, name, column["edges"], at_sites)
            assert all(n == 0 or n >= smallest for n in column["counts"])
            assert column["count"] == sum(column["counts"])
            assert (column["edges"][0], column["edges"][-1]) == tuple(map(float, COLUMNS[name]["range"]))
        if smallest == 1 and column["count"]:
            assert len(column["counts"]) == (4 if name == "constant" else 20)


def test_small_bins_are_merged_through_the_whole_federation(federation: Any) -> None:
    tables = sites(federation, 1, [400, 300, 3])
    params = {"columns": ["x", "grade"], "bins": 40}
    outcome = federation.run(
        federation.plan("statistics.frequency", params, tables), tables, dict.fromkeys(tables, STRICT)
    )
    found = outcome["result"]["frequency"]["columns"]
    assert found["x"]["withheld_sites"] == 1
    assert found["x"]["counts"] == pooled_bins(tables, "x", found["x"]["edges"], 5)
    assert 5 < len(found["x"]["counts"]) < 40
    grade = concatenate([tables["s0"], tables["s1"]])["grade"]
    assert found["grade"]["counts"][0] in (None, int((grade == "a").sum()))


def test_columns_of_one_kind_only(federation: Any) -> None:
    tables = sites(federation, 2, [30, 20])
    for columns in (["x"], ["grade"]):
        plan = federation.plan("statistics.frequency", {"columns": columns, "bins": 1}, tables)
        outcome = federation.run(plan, tables)
        assert list(outcome["result"]["frequency"]["columns"]) == columns


def test_a_small_code_and_its_complement_are_withheld(federation: Any, drive: Any) -> None:
    columns = {"c": {"dtype": "text", "values": ["p", "q", "r"]}}
    table = federation.table({"c": ["p"] * 30 + ["q"] * 2 + ["r"] * 9}, columns)
    found = frequency(drive, {"a": table}, 5)["c"]
    assert found["counts"][1:] == [None, None]


def test_bins_small_in_the_cohort_only_are_merged_with_a_neighbour(federation: Any, drive: Any) -> None:
    values = [1.5] * 20 + [2.5] * 3 + [3.5] * 20
    tables = {"a": federation.table({"x": values}, {"x": {"range": [0, 4]}})}
    for at_sites in (1, 5):
        found = frequency(drive, tables, 5, at_sites, bins=4)["x"]
        assert found["edges"] == [0, 2, 4]  # nor does an empty first bin tell where the smallest value is
        assert found["counts"] == [20, 23]


@pytest.mark.parametrize("at_sites", [1, 5])
def test_no_empty_tail_tells_an_extreme(federation: Any, drive: Any, at_sites: int) -> None:
    """One salary of 987 654 among many small ones: neither it nor its bin can be seen."""
    random, columns = np.random.default_rng(0), {"x": {"range": [0, 1e6]}}
    many = {s: random.uniform(20, 100, 200) * 1e3 for s in "abc"}
    known = None
    for top in (987_654.0, 500_000.0):
        tables = {s: federation.table({"x": [*many[s], *([top] if s == "b" else [])]}, columns) for s in many}
        found = frequency(drive, tables, 5, at_sites, bins=4096)["x"]
        assert sum(found["counts"]) == 601
        assert found["counts"][0] >= 5
        assert found["counts"][-1] >= 5
        assert found["edges"][-2] < 100_000
        assert found == (known or found)
        known = found


@pytest.mark.parametrize(
    ("params", "code", "field"),
    [
        ({"columns": ["x", "free"]}, "plan.bad-column", "free"),
        ({"columns": ["none"]}, "plan.bad-column", "none"),
        ({"columns": ["x"], "edges": {"grade": [1]}}, "plan.bad-column", "grade"),
        ({"edges": {"x": [1, 1]}}, "plan.bad-value", "x"),
        ({"edges": {"x": [7]}}, "plan.bad-value", "x"),
    ],
)
def test_what_has_no_table_is_refused(federation: Any, params: dict[str, Any], code: str, field: str) -> None:
    tables = sites(federation, 1, [9])
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.frequency", params, tables), tables)
    assert (caught.value.code, caught.value.field) == (code, field)
