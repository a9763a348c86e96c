"""t-tests equal scipy on the pooled rows; where a sample is withheld nothing is tested."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from atoll.contract.disclosure import Rule
from atoll.contract.errors import PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import concatenate

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "arm": {"dtype": "text", "values": ["treated", "control", "other"]},
    "sex": {"dtype": "integer", "values": [0, 1]},
    "x": {"range": [-1e4, 1e4]},
    "y": {"range": [0, 500]},
    "tight": {"range": [0, 1e7]},
    "single": {"range": [0, 10]},
}


def site(federation: Any, random: np.random.Generator, n: int) -> Any:
    arm = random.choice(np.array(["treated", "control", "other", None], object), n)
    x = 100 + 2.0 * (arm == "treated") + random.normal(0, 3, n)
    y = np.clip(x + random.normal(0.5, 1, n), 0, 500)
    for values in (x, y):
        values[random.random(n) < 0.1] = NAN
    data = {"arm": arm, "sex": random.integers(0, 2, n).astype(float), "x": x, "y": y}
    return federation.table({**data, "tight": random.normal(1e6, 1e-3, n), "single": np.full(n, 3.7)}, COLUMNS)


def ttest(drive: Any, tables: dict[str, Any], rule: Rule | None = None, **params: Any) -> dict[str, Any]:
    rule = rule or Rule()
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, rule.min_group_size)
    made = build("statistics.ttest", {"column": "x", **params})
    return drive(made.coordinate(cohort), tables, rule=rule).result["ttest"]


def same(found: dict[str, Any], other: Any, confidence: float = 0.95) -> None:
    assert found["t"] == pytest.approx(float(other.statistic), rel=1e-9)
    assert found["df"] == pytest.approx(float(other.df), rel=1e-9)
    assert found["p_value"] == pytest.approx(float(other.pvalue), rel=1e-8)
    ends = [-math.inf if found["interval"][0] is None else found["interval"][0]]
    ends += [math.inf if found["interval"][1] is None else found["interval"][1]]
    told = other.confidence_interval(confidence)
    assert ends == pytest.approx([float(told.low), float(told.high)], rel=1e-9)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 30, 80]), min_size=1, max_size=4).filter(lambda s: sum(s) > 29),
    alternative=st.sampled_from(["two-sided", "less", "greater"]),
    confidence=st.sampled_from([0.9, 0.95]),
)
def test_equals_scipy_on_the_pooled_rows(
    federation: Any, drive: Any, seed: int, sizes: list[int], alternative: Any, confidence: float
) -> None:
    random = np.random.default_rng(seed)
    tables = {f"s{i}": site(federation, random, n) for i, n in enumerate(sizes)}
    whole = concatenate(list(tables.values()))
    x, y, arm = whole["x"], whole["y"], whole["arm"]
    parts = [x[(arm == code) & ~np.isnan(x)] for code in ("treated", "control")]
    more = {"alternative": alternative, "confidence": confidence}
    for pool in (True, False):
        found = ttest(drive, tables, by="arm", groups=["treated", "control"], equal_variance=pool, **more)
        same(found, ttest_ind(*parts, equal_var=pool, alternative=alternative), confidence)
        assert [sample["count"] for sample in found["samples"]] == [len(part) for part in parts]
        deviations = [(len(p) - 1) * p.var(ddof=1) for p in parts]
        pooled = math.sqrt(sum(deviations) / (len(parts[0]) + len(parts[1]) - 2))
        assert found["cohens_d"] == pytest.approx((parts[0].mean() - parts[1].mean()) / pooled, rel=1e-9)
    known = x[~np.isnan(x)]
    found = ttest(drive, tables, mean=99.5, **more)
    other = ttest_1samp(known, 99.5, alternative=alternative)
    told = other.confidence_interval(confidence)  # scipy's is of the mean, not of the difference
    assert found["t"] == pytest.approx(other.statistic, rel=1e-9)
    assert found["p_value"] == pytest.approx(other.pvalue, rel=1e-8)
    for end, want in zip(found["interval"], (told.low, told.high), strict=True):
        assert end is None or end + 99.5 == pytest.approx(float(want), rel=1e-9)
    assert found["cohens_d"] == pytest.approx((known.mean() - 99.5) / known.std(ddof=1), rel=1e-9)
    both = ~np.isnan(x) & ~np.isnan(y)
    same(ttest(drive, tables, paired="y", **more), ttest_rel(x[both], y[both], alternative=alternative), confidence)


def test_small_spreads_far_from_zero_keep_their_digits(federation: Any, drive: Any) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), 50) for i in range(3)}
    whole = concatenate(list(tables.values()))
    values = whole["tight"].astype(np.longdouble)
    t = (values.mean() - 1e6) / (values.std(ddof=1) / np.sqrt(np.longdouble(len(values))))
    assert ttest(drive, tables, column="tight", mean=1e6)["t"] == pytest.approx(float(t), rel=1e-9)
    a, b = values[whole["sex"] == 0], values[whole["sex"] == 1]
    t = (a.mean() - b.mean()) / np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    assert ttest(drive, tables, column="tight", by="sex")["t"] == pytest.approx(float(t), rel=1e-9)


@pytest.mark.parametrize("params", [{"by": "sex"}, {"mean": 99.0}, {"paired": "y"}])
def test_equals_scipy_through_the_whole_federation(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), n) for i, n in enumerate((50, 40, 0))}
    plan = federation.plan("statistics.ttest", {"column": "x", **params}, tables)
    found = federation.run(plan, tables)["result"]["ttest"]
    assert found == ttest(drive, tables, Rule(1), **params)
    assert found["note"] == ""
    assert all(body["clipped"] == 0 for body in federation.releases())


# ---------------------------------------------------------------- what is withheld, undefined or refused


def test_a_withheld_sample_leaves_nothing_to_test(federation: Any, drive: Any) -> None:
    x = np.where(np.arange(40) < 3, 1.0 * np.arange(40), NAN)
    data = {"x": x, "sex": (np.arange(40) % 13 == 0).astype(float)}
    columns = {"x": {"range": [0, 1e6]}, "sex": COLUMNS["sex"]}
    few = {"a": federation.table(data, columns)}
    dominated = {"a": federation.table({**data, "x": np.append(np.ones(39), 1e6)}, columns)}
    for tables, params in ((few, {"mean": 0}), (dominated, {"mean": 0}), (dominated, {"by": "sex"})):
        found = ttest(drive, tables, Rule(5, 1, 0.85), **params)
        assert (found["t"], found["p_value"], found["interval"], found["difference"]) == (None, None, None, None)
        assert None in [sample["mean"] for sample in found["samples"]]
        assert "withheld" in found["note"]


@pytest.mark.parametrize("reveals", [True, False])
@pytest.mark.parametrize("alone", ["x", "y"])
def test_pairs_are_not_told_beside_a_few_single_values(federation: Any, drive: Any, alone: str, reveals: bool) -> None:
    """One has one value of the pair: the sums of both columns less that of the pairs would tell it."""
    data = dict(zip("xy", np.random.default_rng(5).normal(100, 3, (2, 60)), strict=True))
    data["y" if alone == "x" else "x"][0] = NAN
    columns = {name: COLUMNS[name] for name in "xy"}
    tables = {"a": federation.table({n: v[:30] for n, v in data.items()}, columns)}
    tables["b"] = federation.table({n: v[30:] for n, v in data.items()}, columns)
    steps = build("statistics.ttest", {"column": "x", "paired": "y"}).coordinate(
        Cohort(("a", "b"), tables["a"].schema, 0, 5)
    )
    driven = drive(steps, tables, rule=Rule(5 if reveals else 1))
    assert driven.result["ttest"]["samples"] == [{"count": None, "mean": None, "std": None}]
    assert "one value of the pair" in driven.result["ttest"]["note"]
    if reveals:
        assert not any(array.any() for name, array in driven.replies[0]["a"].items() if name != "left_out")
    assert ttest(drive, tables, Rule(5), mean=99.0)["t"] is not None


@pytest.mark.parametrize(("column", "rows"), [("single", 40), ("x", 1), ("x", 0)])
def test_what_is_undefined_says_so(federation: Any, drive: Any, column: str, rows: int) -> None:
    found = ttest(drive, {"a": site(federation, np.random.default_rng(2), rows)}, column=column, mean=1.0)
    assert (found["t"], found["p_value"]) == (None, None)
    assert found["note"]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({}, "plan.bad-value"),
        ({"mean": 1.0, "by": "sex"}, "plan.bad-value"),
        ({"mean": 1.0, "groups": [0, 1]}, "plan.bad-value"),
        ({"by": "arm"}, "plan.bad-column"),
        ({"by": "x"}, "plan.bad-column"),
        ({"by": "sex", "groups": [0, 7]}, "plan.bad-column"),
        ({"by": "sex", "groups": [1, 1]}, "plan.bad-column"),
        ({"by": "sex", "column": "arm"}, "plan.bad-column"),
        ({"mean": 1.0, "column": "none"}, "plan.bad-column"),
        ({"paired": "arm"}, "plan.bad-column"),
    ],
)
def test_questions_that_do_not_fit_are_refused(federation: Any, params: dict[str, Any], code: str) -> None:
    tables = {"a": site(federation, np.random.default_rng(3), 9)}
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.ttest", {"column": "x", **params}, tables), tables)
    assert caught.value.code == code


@pytest.mark.parametrize("center", [np.zeros(9), np.zeros((9, 1)), np.array([math.inf])])
def test_crafted_arrays_are_refused(federation: Any, center: Any) -> None:
    made = build("statistics.ttest", {"column": "x", "mean": 0})
    desk = type("Desk", (), {"table": site(federation, np.random.default_rng(1), 9), "progress": lambda *_: None})()
    with pytest.raises(ProtocolError) as caught:
        type(made).handlers["moments"].answer(
            made, desk, Task(TaskId("0", 0, 0, "reply", "a"), {"center": center}, (0,))
        )
    assert caught.value.code == "task.array"
