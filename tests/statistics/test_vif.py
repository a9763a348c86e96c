"""VIF equals statsmodels on the pooled complete rows; exactly collinear columns are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.outliers_influence import variance_inflation_factor

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-100, 100]},
    "b": {"range": [-100, 100]},
    "c": {"range": [0, 1e7]},
    "sum": {"range": [-1e3, 1e3]},
    "single": {"range": [0, 10]},
    "text": {"dtype": "text"},
}


def site(federation: Any, random: np.random.Generator, n: int) -> Any:
    a = random.normal(0, 5, n)
    b = a + random.normal(0, 2, n)
    data = {"a": a, "b": b, "c": 1e6 + 100 * a - 50 * b + random.normal(0, 90, n), "sum": a + 2 * b}
    data["b"] = np.where(random.random(n) < 0.1, np.nan, b)
    return federation.table({**data, "single": np.full(n, 3.7), "text": [None] * n}, COLUMNS)


def vif(drive: Any, tables: dict[str, Any], columns: list[str], rule: Rule | None = None) -> dict[str, Any]:
    rule = rule or Rule()
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, rule.min_group_size)
    made = build("statistics.vif", {"columns": columns})
    return drive(made.coordinate(cohort), tables, rule=rule).result["vif"]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 20, 90]), min_size=1, max_size=4).filter(lambda s: sum(s) > 19),
)
def test_equals_statsmodels_on_pooled_complete_rows(federation: Any, drive: Any, seed: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    tables = {f"s{i}": site(federation, random, n) for i, n in enumerate(sizes)}
    found, whole = vif(drive, tables, ["a", "b", "c"]), concatenate(list(tables.values()))
    x = np.column_stack([whole[name] for name in "abc"])
    x = x[~np.isnan(x).any(axis=1)]
    design = np.column_stack([np.ones(len(x)), x - x.mean(axis=0)])
    for i, name in enumerate("abc"):
        factor = variance_inflation_factor(design, i + 1)
        assert found["columns"][name]["vif"] == pytest.approx(factor, rel=1e-9)
        assert found["columns"][name]["r_squared"] == pytest.approx(1 - 1 / factor, rel=1e-9)
    assert found["rows"] == len(x)
    assert found["notes"] == []


def test_exactly_collinear_columns_are_infinite_and_named(federation: Any, drive: Any) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), 60) for i in range(3)}
    found = vif(drive, tables, ["a", "b", "c", "sum"])
    assert [found["columns"][name]["vif"] is None for name in ("a", "b", "c", "sum")] == [True, True, False, True]
    assert found["columns"]["sum"]["r_squared"] == 1
    assert found["notes"] == ["infinite, as exactly collinear: a, b, sum"]
    without = vif(drive, tables, ["a", "b", "c"])
    assert found["columns"]["c"]["vif"] == pytest.approx(without["columns"]["c"]["vif"], rel=1e-9)


def test_a_column_that_does_not_vary_has_none(federation: Any, drive: Any) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), 60) for i in range(3)}
    found = vif(drive, tables, ["a", "single", "b"])
    assert found["columns"]["single"] == {"vif": None, "r_squared": None}
    assert "single" in found["notes"][0]
    assert found["columns"]["a"]["vif"] > 1


def test_nothing_is_told_of_a_cohort_with_few_rows(federation: Any, drive: Any) -> None:
    cohort = Cohort(("s",), site(federation, np.random.default_rng(1), 0).schema, 0, 50)
    tables = {"s": site(federation, np.random.default_rng(1), 20)}
    found = drive(build("statistics.vif", {"columns": ["a", "b"]}).coordinate(cohort), tables).result["vif"]
    assert found["rows"] is None
    assert found["columns"]["a"]["vif"] is None
    assert "withheld" in found["notes"][0]


def test_runs_in_a_whole_federation(federation: Any, drive: Any) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), 40) for i in range(3)}
    plan = federation.plan("statistics.vif", {"columns": ["a", "b", "c"]}, tables)
    found = federation.run(plan, tables)["result"]["vif"]
    assert found == vif(drive, tables, ["a", "b", "c"])
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.vif", {"columns": ["a", "text"]}, tables), {"s0": tables["s0"]})
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", "text")
