"""ANOVA equals scipy on the pooled rows; where a group is withheld nothing is tested."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import f_oneway

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "arm": {"dtype": "text", "values": ["a", "b", "c", "never"]},
    "x": {"range": [-1e4, 1e4]},
    "tight": {"range": [0, 1e7]},
    "single": {"range": [0, 10]},
}


def site(federation: Any, random: np.random.Generator, n: int, arms: tuple[str, ...] = ("a", "b", "c")) -> Any:
    arm = random.choice(np.array([*arms, None], object), n)
    effect = np.array([{"a": 0.0, "b": 0.5, "c": 2.0, None: 9.0}[v] for v in arm])
    x = 5 + effect + random.normal(0, 2, n)
    x[random.random(n) < 0.1] = NAN
    data = {"arm": arm, "x": x, "tight": 1e6 + 1e-3 * effect + random.normal(0, 1e-3, n), "single": np.full(n, 3.7)}
    return federation.table(data, COLUMNS)


def anova(drive: Any, tables: dict[str, Any], rule: Rule | None = None, **params: Any) -> dict[str, Any]:
    rule = rule or Rule()
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, rule.min_group_size)
    made = build("statistics.anova", {"by": "arm", **params})
    return drive(made.coordinate(cohort), tables, rule=rule).result["anova"]


def pooled(tables: dict[str, Any], column: str) -> list[np.ndarray]:
    whole = concatenate(list(tables.values()))
    values, arm = whole[column].astype(np.longdouble), whole["arm"]
    parts = [values[(arm == name) & ~np.isnan(values)] for name in COLUMNS["arm"]["values"]]
    return [part for part in parts if len(part)]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 12, 60, 150]), min_size=1, max_size=4).filter(lambda s: sum(s) > 30),
    column=st.sampled_from(["x", "tight"]),
)
def test_equals_the_pooled_answer(federation: Any, drive: Any, seed: int, sizes: list[int], column: str) -> None:
    random = np.random.default_rng(seed)
    tables = {f"s{i}": site(federation, random, n) for i, n in enumerate(sizes)}
    found, parts = anova(drive, tables, column=column), pooled(tables, column)
    grand = np.concatenate(parts).mean()
    between = sum(len(p) * (p.mean() - grand) ** 2 for p in parts)
    within = sum(((p - p.mean()) ** 2).sum() for p in parts)
    k, n = len(parts), sum(map(len, parts))
    assert (found["df_between"], found["df_within"]) == (k - 1, n - k)
    assert found["ss_between"] == pytest.approx(float(between), rel=1e-9)
    assert found["ss_within"] == pytest.approx(float(within), rel=1e-9)
    assert found["f"] == pytest.approx(float(between / (k - 1) / (within / (n - k))), rel=1e-9)
    assert found["eta_squared"] == pytest.approx(float(between / (between + within)), rel=1e-9)
    assert [group["count"] for group in found["groups"]] == [len(p) for p in parts]
    if column == "x":
        other = f_oneway(*(part.astype(float) for part in parts))
        assert found["f"] == pytest.approx(other.statistic, rel=1e-9)
        assert found["p_value"] == pytest.approx(other.pvalue, rel=1e-8)


def test_equals_scipy_through_the_whole_federation(federation: Any) -> None:
    random = np.random.default_rng(1)
    tables = {
        "a": site(federation, random, 90, ("a", "b")),
        "b": site(federation, random, 70),
        "c": site(federation, random, 0),
    }
    plan = federation.plan("statistics.anova", {"column": "x", "by": "arm"}, tables)
    found = federation.run(plan, tables)["result"]["anova"]
    other = f_oneway(*(part.astype(float) for part in pooled(tables, "x")))
    assert found["f"] == pytest.approx(other.statistic, rel=1e-9)
    assert found["note"] == ""


def test_a_withheld_group_leaves_nothing_to_test(federation: Any, drive: Any) -> None:
    arm = np.array(["a"] * 3 + ["b"] * 30 + ["c"] * 20, object)
    x = np.arange(53.0)
    tables = {"s": federation.table({"arm": arm, "x": x}, {"arm": COLUMNS["arm"], "x": {"range": [0, 100]}})}
    found = anova(drive, tables, Rule(5), column="x")
    assert (found["f"], found["p_value"], found["eta_squared"]) == (None, None, None)
    assert [group["count"] for group in found["groups"]] == [None, 30, None]
    assert "withheld" in found["note"]


@pytest.mark.parametrize(("column", "rows"), [("single", 40), ("x", 0)])
def test_what_is_undefined_says_so(federation: Any, drive: Any, column: str, rows: int) -> None:
    found = anova(drive, {"s": site(federation, np.random.default_rng(2), rows)}, column=column)
    assert (found["f"], found["p_value"]) == (None, None)
    assert found["note"]


@pytest.mark.parametrize("params", [{"column": "arm"}, {"column": "x", "by": "single"}, {"column": "none"}])
def test_columns_that_do_not_fit_are_refused(federation: Any, params: dict[str, Any]) -> None:
    tables = {"s": site(federation, np.random.default_rng(3), 9)}
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.anova", {"by": "arm", **params}, tables), tables)
    assert caught.value.code == "plan.bad-column"
