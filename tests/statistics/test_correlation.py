"""Correlations equal those of the pooled rows (Spearman: within its bound), and single rows stay hidden."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from atoll.contract.disclosure import Rule
from atoll.contract.errors import DisclosureError, PlanError, ProtocolError
from atoll.contract.program import Cohort, build
from atoll.contract.rounds import Task, TaskId
from atoll.data.table import concatenate
from atoll.runtime.policy import Policy
from atoll.statistics.correlation import _most_of_pairs

NAN = float("nan")
COLUMNS: dict[str, dict[str, Any]] = {
    "wide": {"range": [-1e6, 1e6]},
    "percent": {"range": [0, 100]},
    "count": {"dtype": "integer", "range": [0, 50]},
    "code": {"dtype": "integer", "values": [1, 2, 5]},
    "tight": {"range": [999_999, 1_000_001]},
    "loose": {"range": [0, 1e7]},
    "zeros": {"range": [0, 1000]},
    "big": {"dtype": "integer", "range": [0, 1_000_000]},
    "single": {"range": [0, 10]},
    "empty": {"range": [0, 1]},
    "text": {"dtype": "text"},
}
VARYING = ["wide", "percent", "count", "code", "tight", "loose", "zeros", "big"]
NUMBERS = [*VARYING, "single", "empty"]


def site(federation: Any, random: np.random.Generator, n: int, shift: float = 0.5, holes: float = 0.1) -> Any:
    u = random.normal(size=n) + shift
    data = {
        "wide": np.clip(u * 100 + random.standard_cauchy(n) * 20, -1e6, 1e6),
        "percent": np.clip(40 + 20 * u + random.normal(0, 10, n), 0, 100),
        "count": np.clip(np.round(8 - 4 * u + random.normal(0, 1, n)), 0, 50),
        "code": random.choice([1.0, 2.0, 5.0], n),
        "tight": 1e6 + 1e-3 * u + random.normal(0, 1e-3, n),
        "loose": 1e6 + random.normal(0, 1e-3, n),
        "zeros": np.maximum(30 * u, 0),
        "big": np.round(np.clip(3000 + 900 * u + random.normal(0, 400, n), 0, 1e6)),
        "single": np.full(n, 3.7),
        "empty": np.full(n, NAN),
    }
    for name in VARYING:
        data[name][random.random(n) < holes] = NAN
    return federation.table({**data, "text": [None] * n}, COLUMNS)


def correlation(drive: Any, tables: dict[str, Any], rule: Rule | None = None, **params: Any) -> dict[str, Any]:
    rule = rule or Rule()
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, rule.min_group_size)
    return drive(build("statistics.correlation", params).coordinate(cohort), tables, rule=rule).result["correlation"]


def pooled(tables: dict[str, Any], names: list[str], missing: str) -> pd.DataFrame:
    whole = concatenate(list(tables.values()))
    frame = pd.DataFrame({name: whole[name] for name in names})
    return frame.dropna() if missing == "listwise" else frame


def wanted(frame: pd.DataFrame) -> np.ndarray:
    """Pearson over each pair's rows in long doubles: pandas itself is 1e-8 off where spreads are small."""
    rows, p = frame.to_numpy(np.longdouble), frame.shape[1]
    found = np.full((p, p), np.nan)
    for i in range(p):
        for j in range(p):
            both = rows[~np.isnan(rows[:, i] + rows[:, j])]
            if len(both) > 1:
                u, v = both[:, i] - both[:, i].mean(), both[:, j] - both[:, j].mean()
                if np.ptp(both[:, i]) > 0 and np.ptp(both[:, j]) > 0:
                    found[i, j] = float((u * v).sum() / np.sqrt((u * u).sum() * (v * v).sum()))
    return found


def matrix(found: dict[str, Any], which: str = "matrix") -> np.ndarray:
    return np.array(found[which], float)


# ---------------------------------------------------------------- equal to the pooled answer


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(0, 80), min_size=1, max_size=5),
    holes=st.sampled_from([0.0, 0.1, 0.6]),
    missing=st.sampled_from(["pairwise", "listwise"]),
)
def test_pearson_equals_the_pooled_answer(
    federation: Any, drive: Any, seed: int, sizes: list[int], holes: float, missing: str
) -> None:
    random = np.random.default_rng(seed)
    tables = {f"s{i}": site(federation, random, n, random.random(), holes) for i, n in enumerate(sizes)}
    names = NUMBERS if missing == "pairwise" else NUMBERS[:-1]
    found, frame = correlation(drive, tables, columns=names, missing=missing), pooled(tables, names, missing)
    assert found["columns"] == names
    np.testing.assert_allclose(matrix(found), wanted(frame), rtol=1e-9, atol=1e-12)
    known = frame.notna().to_numpy().astype(int)
    assert found["pairs_count"] == (known.T @ known).tolist()
    if missing == "listwise" and len(frame) > 1:
        np.testing.assert_allclose(found["mean"], frame.to_numpy(np.longdouble).mean(axis=0).astype(float), rtol=1e-12)
        std = frame.to_numpy(np.longdouble).std(axis=0, ddof=1).astype(float)
        np.testing.assert_allclose(found["std"], std, rtol=1e-9, atol=1e-12)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(5, 200), min_size=1, max_size=4),
    missing=st.sampled_from(["pairwise", "listwise"]),
    bins=st.sampled_from([16, 128, 2048]),
    smallest=st.sampled_from([1, 5]),
)
def test_spearman_is_within_its_bound(
    federation: Any, drive: Any, seed: int, sizes: list[int], missing: str, bins: int, smallest: int
) -> None:
    random = np.random.default_rng(seed)
    holes = 0.05 if smallest == 1 else 0.0
    tables = {f"s{i}": site(federation, random, n, random.random(), holes) for i, n in enumerate(sizes)}
    params = {"columns": VARYING, "method": "spearman", "missing": missing, "bins": bins}
    found = correlation(drive, tables, Rule(smallest), **params)
    want = wanted(pooled(tables, VARYING, missing).rank())
    told = ~np.isnan(matrix(found))
    off = np.abs(matrix(found) - want)[told & ~np.isnan(want)]
    assert (off <= matrix(found, "error_bound")[told & ~np.isnan(want)] + 1e-12).all()
    assert not (told & np.isnan(want)).any()
    if smallest == 1:
        i, j = VARYING.index("count"), VARYING.index("code")
        if bins > 50:
            assert found["error_bound"][i][j] in (0.0, None)
        assert (matrix(found, "error_bound")[told] < 1).all() or bins == 16 or sum(sizes) < 50


def test_spearman_of_many_rows_is_close_and_says_so(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(4)
    tables = {f"s{i}": site(federation, random, n, i / 3, 0.0) for i, n in enumerate((9000, 4000, 7000))}
    plain = correlation(drive, tables, method="spearman", columns=VARYING)
    frame = pooled(tables, VARYING, "pairwise")
    np.testing.assert_allclose(matrix(plain), frame.corr("spearman"), atol=2e-5)
    assert matrix(plain, "error_bound").max() < 4e-3
    guarded = correlation(drive, tables, Rule(5), method="spearman", columns=VARYING)
    np.testing.assert_allclose(matrix(guarded), frame.corr("spearman"), atol=1e-4)
    assert matrix(guarded, "error_bound").max() < 0.05


def test_p_values_are_those_of_scipy(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(5)
    tables = {"a": site(federation, random, 9, holes=0.0), "b": site(federation, random, 14, holes=0.0)}
    frame = pooled(tables, ["percent", "count"], "listwise")
    found = correlation(drive, tables, columns=["percent", "count"])
    assert found["p_values"][0][1] == pytest.approx(pearsonr(frame["percent"], frame["count"]).pvalue, rel=1e-9)
    assert found["p_values"][0][0] == 0
    found = correlation(drive, tables, columns=["code", "count"], method="spearman")
    frame = pooled(tables, ["code", "count"], "listwise")
    other = spearmanr(frame["code"], frame["count"])
    assert found["matrix"][0][1] == pytest.approx(other.statistic, rel=1e-9)
    assert found["p_values"][0][1] == pytest.approx(other.pvalue, rel=1e-9)
    assert found["error_bound"][0][1] == 0


def test_columns_that_do_not_vary_are_named(federation: Any, drive: Any) -> None:
    tables = {
        "a": site(federation, np.random.default_rng(6), 30),
        "none": site(federation, np.random.default_rng(6), 0),
    }
    for method in ("pearson", "spearman"):
        found = correlation(drive, tables, method=method, columns=["percent", "single", "empty"])
        assert found["matrix"][0] == [1.0, None, None]
        assert found["p_values"][1] == [None, None, None]
        assert "single, empty" in found["notes"][0]


def test_a_spread_that_is_lost_in_common_rows_is_not_told(federation: Any, drive: Any) -> None:
    """x is far from its mean, and almost constant, in the rows that have y."""
    x = np.concatenate([np.full(50, -9e5), 9e5 + 1e-4 * np.arange(50)])
    y = np.concatenate([np.full(50, NAN), np.arange(50.0)])
    tables = {"a": federation.table({"x": x, "y": y}, {"x": {"range": [-1e6, 1e6]}, "y": {"range": [0, 100]}})}
    found = correlation(drive, tables)
    assert found["matrix"] == [[1.0, None], [None, 1.0]]
    assert found["notes"] == ["undefined, as one hardly varies in the rows that have both: x-y"]
    listwise = correlation(drive, tables, missing="listwise")
    assert listwise["matrix"][0][1] == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_equals_the_pooled_answer_through_the_whole_federation(federation: Any, method: str) -> None:
    random = np.random.default_rng(7)
    tables = {n: site(federation, random, k, s, 0.1) for n, k, s in [("a", 80, 0.1), ("b", 40, 0.9), ("c", 60, 0.4)]}
    columns = ["percent", "count", "code"]
    plan = federation.plan(
        "statistics.correlation", {"columns": columns, "method": method}, tables, run={"min_group_size": 1}
    )
    found = federation.run(plan, tables)["result"]["correlation"]
    frame = pooled(tables, columns, "pairwise")
    want = wanted(frame.rank() if method == "spearman" else frame)
    off = np.abs(matrix(found) - want)
    assert (off <= (1e-9 if method == "pearson" else matrix(found, "error_bound") + 1e-12)).all()
    assert all(body["clipped"] == 0 for body in federation.releases())


# ---------------------------------------------------------------- small groups


def pair(federation: Any, x: Any, y: Any) -> Any:
    columns = {"x": {"range": [0, 100]}, "y": {"range": [0, 100]}}
    return federation.table({"x": np.asarray(x, float), "y": np.asarray(y, float)}, columns)


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("common", [3, 27])
def test_pairs_of_which_a_difference_tells_a_few_rows_are_withheld(
    federation: Any, drive: Any, common: int, method: str
) -> None:
    """3 rows have both columns; or 27 of the 30 with x have y, and Σx of the other 3 would be the difference."""
    random = np.random.default_rng(8)
    x, y = random.uniform(0, 100, (2, 30))
    y[common:] = NAN
    tables = {
        "a": pair(federation, x, np.where(np.arange(30) < 27, y, NAN)),
        "b": pair(federation, *random.uniform(0, 100, (2, 30))),
    }
    found = correlation(drive, tables, Rule(5), method=method)
    assert found["matrix"][0][1] is None
    assert found["pairs_count"][0][1] is None
    assert found["matrix"][0][0] == 1
    assert "x-y" in found["notes"][-1]
    if common == 27:
        assert correlation(drive, tables, Rule(5), method=method, missing="listwise")["matrix"][0][1] is None


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize("reveals", [True, False])
def test_complete_rows_are_not_told_beside_a_few_others(
    federation: Any, drive: Any, method: str, reveals: bool
) -> None:
    """One has x and not y: the sum of all x, which other programs tell, less that of complete rows would be his."""
    x, y = np.random.default_rng(8).uniform(0, 100, (2, 60))
    y[0] = NAN
    tables = {"a": pair(federation, x[:30], y[:30]), "b": pair(federation, x[30:], y[30:])}
    made = build("statistics.correlation", {"missing": "listwise", "method": method})
    steps = made.coordinate(Cohort(tuple(tables), tables["a"].schema, 0, 5))
    driven = drive(steps, tables, rule=Rule(5 if reveals else 1))
    found = driven.result["correlation"]
    assert found["matrix"] == found["pairs_count"] == [[None, None], [None, None]]
    assert found.get("mean", [None, None]) == [None, None]
    assert "withheld" in found["notes"][0]
    if reveals:
        for replies in driven.replies:
            assert not any(array.any() for name, array in replies["a"].items() if name != "left_out")
    y[1:5] = NAN
    tables["a"] = pair(federation, x[:30], y[:30])
    assert correlation(drive, tables, Rule(5), missing="listwise", method=method)["pairs_count"][0][1] == 55


def test_what_few_people_dominate_is_withheld_with_its_pairs(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(8)
    percent, other, wide = random.uniform(0, 100, (3, 50))
    wide[7] = 1e6
    data = {"percent": percent, "loose": other, "wide": wide}
    table = federation.table(data, {name: COLUMNS[name] for name in data})
    rule, cohort = Rule(5, 1, 0.85), Cohort(("a",), table.schema, 0, 5)
    driven = drive(build("statistics.correlation", {}).coordinate(cohort), {"a": table}, rule=rule)
    found = driven.result["correlation"]
    assert found["mean"] == pytest.approx([percent.mean(), other.mean(), None])
    assert found["matrix"][0][1] == pytest.approx(np.corrcoef(percent, other)[0, 1], rel=1e-9)
    assert (found["matrix"][2], found["matrix"][0][2], found["matrix"][1][2]) == ([None] * 3, None, None)
    assert not driven.replies[0]["a"]["s1"][2]
    sums = driven.replies[-1]["a"]["sums"]
    assert not sums[2].any()
    assert not sums[:, 2].any()
    for asked in ("pca", "vif"):
        told = drive(build(f"statistics.{asked}", {}).coordinate(cohort), {"a": table}, rule=rule).result[asked]
        assert "wide" in told["notes"][0]
        assert not (told["loadings"] if asked == "pca" else told["columns"]["loose"]["r_squared"])
    ranked = correlation(drive, {"a": table}, rule, method="spearman")
    assert ranked["matrix"][0][2] is not None


def test_a_column_may_be_dominated_in_a_pairs_rows_only(federation: Any, drive: Any) -> None:
    x, y = np.random.default_rng(8).uniform(1, 2, (2, 50))
    x[:10], x[10], y[:10] = 90, 95, NAN
    table = pair(federation, x, y)
    assert correlation(drive, {"a": table}, Rule(5, 1, 0.5))["matrix"] == [[1, None], [None, 1]]
    assert correlation(drive, {"a": table}, Rule(5, 1, 0.7))["matrix"][0][1] is not None


@pytest.mark.parametrize("near", [3, 64, 500])
def test_each_pairs_largest_are_found(near: int) -> None:
    random = np.random.default_rng(3)
    sizes, known = random.gamma(1, 1, (3, 400)), random.random((400, 3)) < [1, 0.7, 0.01]
    sizes = np.where(known.T, sizes, 0)
    found = np.sort(_most_of_pairs(sizes, known, near).reshape(3, 3, -1)[..., :3], axis=-1)
    for i, j in np.ndindex(3, 3):
        assert found[i, j].tolist() == np.sort(sizes[i] * known[:, j])[-3:].tolist()


def test_a_site_with_few_complete_rows_is_refused(federation: Any) -> None:
    random = np.random.default_rng(9)
    x, y = random.uniform(0, 100, (2, 30))
    tables = {"a": pair(federation, x, y), "b": pair(federation, x, np.where(np.arange(30) < 3, y, NAN))}
    strict = Policy.sandbox().model_copy(update={"min_group_size": 5})
    plan = federation.plan("statistics.correlation", {"missing": "listwise"}, tables)
    with pytest.raises(DisclosureError) as caught:
        federation.run(plan, tables, {"b": strict})
    assert (caught.value.code, caught.value.field) == ("disclosure.small-group", "rows")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), rows=st.integers(5, 60), smallest=st.integers(2, 7))
def test_histograms_show_no_small_group(federation: Any, drive: Any, seed: int, rows: int, smallest: int) -> None:
    """Nor do differences of the histograms of all refinements together."""
    random = np.random.default_rng(seed)
    table = pair(federation, random.gamma(1, 3, rows).clip(0, 100), np.round(random.uniform(0, 100, rows)))
    params = {"method": "spearman", "bins": 16, "refinements": 3}
    steps = build("statistics.correlation", params).coordinate(Cohort(("a",), table.schema, 0, smallest))
    driven = drive(steps, {"a": table}, rule=Rule(smallest))
    for i in range(2):
        levels = {0}
        for asked, replies in zip(driven.rounds, driven.replies, strict=True):
            if asked.name == "histogram":
                levels |= set(np.cumsum(replies["a"]["histogram"][i]).tolist())
        if rows >= smallest:
            assert (np.diff(sorted(levels)) >= smallest).all()
        else:
            assert levels == {0}


def test_made_up_counts_do_not_single_out_a_row(federation: Any, drive: Any) -> None:
    """A gap of a billion ranks below the one largest x, asked of a site that others see alone: the answer is
    the same whichever of the five largest x has the outstanding y."""
    x, answers = np.arange(40.0), []
    for place in (37, 39):
        y = np.full(40, 10.0) + np.arange(40) % 2
        y[place] = 90
        table = pair(federation, x, y)
        made = build("statistics.correlation", {"method": "spearman", "bins": 128, "refinements": 0})
        driven = drive(made.coordinate(Cohort(("a",), table.schema, 0, 5)), {"a": table}, rule=Rule(5))
        counts = driven.rounds[-1].send["counts"].copy()
        counts[0, np.searchsorted(driven.rounds[0].send["edges"][0], 38.5)] = 1e9
        desk = _Desk(table)
        asks = {"histogram": driven.rounds[0].send, "rank_products": {"counts": counts}}
        for name, send in asks.items():
            task = Task(TaskId("0" * 32, 0, 0, "reply", "a"), send, (0,))
            reply = type(made).handlers[name].answer(made, desk, task)
        answers.append(reply["sums"][0, 1, 0])
    assert answers[0] == pytest.approx(answers[1], rel=1e-9)


class _Desk:
    min_group_size = 5

    def __init__(self, table: Any) -> None:
        self.table, self.state = table, {}

    def progress(self, done: float, total: float) -> None:
        """Nobody watches."""


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("column", ["text", "none"])
def test_columns_without_numbers_are_refused(federation: Any, column: str) -> None:
    tables = {"a": site(federation, np.random.default_rng(1), 9)}
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.correlation", {"columns": ["wide", column]}, tables), tables)
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", column)


@pytest.mark.parametrize(
    ("name", "send"),
    [
        ("moments", {"center": np.zeros((30, 2)), "scale": np.ones(2)}),
        ("moments", {"center": np.zeros(2), "scale": np.zeros(2)}),
        ("products", {"center": np.full(2, math.inf), "scale": np.ones(2)}),
        ("products", {"center": np.zeros(2), "scale": -np.ones(2)}),
        ("histogram", {"edges": np.zeros((2, 5))}),
        ("rank_products", {"counts": np.ones((2, 2048))}),
    ],
)
def test_crafted_arrays_are_refused(federation: Any, name: str, send: dict[str, Any]) -> None:
    made, table = build("statistics.correlation", {}), pair(federation, np.arange(30), np.arange(30))
    task = Task(TaskId("0" * 32, 0, 0, "reply", "a"), send, (0,))
    with pytest.raises(ProtocolError) as caught:
        type(made).handlers[name].answer(made, _Desk(table), task)
    assert caught.value.code == "task.array"


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("method", ["pearson", "spearman"])
@pytest.mark.parametrize(("round_number", "lasting"), [(0, False), (1, True)])
def test_the_answer_is_that_of_the_survivors(
    federation: Any, drive: Any, method: str, round_number: int, lasting: bool
) -> None:
    random = np.random.default_rng(10)
    tables = {n: site(federation, random, 60, i / 2, 0.0) for i, n in enumerate("abc")}
    columns = ["count", "code"] if method == "spearman" else ["percent", "wide"]
    steps = build("statistics.correlation", {"columns": columns, "method": method}).coordinate(
        Cohort(tuple(tables), tables["a"].schema)
    )

    def absent(number: int) -> list[str]:
        return ["c"] if number == round_number or (lasting and number > round_number) else []

    driven = drive(steps, tables, absent=absent)
    if not lasting:
        assert all("c" not in replies for replies in driven.replies)
    frame = pooled({n: tables[n] for n in "ab"}, columns, "pairwise")
    if method == "pearson":
        np.testing.assert_allclose(matrix(driven.result["correlation"]), wanted(frame), rtol=1e-9)
    elif not lasting:
        np.testing.assert_allclose(matrix(driven.result["correlation"]), frame.corr("spearman"), rtol=1e-9)
