"""Correlations equal those of the pooled rows (Spearman: within its bound)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from atoll.contract.disclosure import Rule
from atoll.contract.program import Cohort, build

from .correlated import NAN, NUMBERS, VARYING, correlation, matrix, pooled, site, wanted

# ---------------------------------------------------------------- equal to the pooled answer


@settings(max_examples=25)
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


@settings(max_examples=25)
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
