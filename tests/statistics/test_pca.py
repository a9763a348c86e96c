"""Principal components equal scikit-learn's on the pooled complete rows, sign included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import concatenate

COLUMNS: dict[str, dict[str, Any]] = {
    "a": {"range": [-1000, 1000]},
    "b": {"range": [-100, 100]},
    "c": {"range": [0, 1e4]},
    "d": {"range": [0, 50], "dtype": "integer"},
    "single": {"range": [0, 10]},
    "text": {"dtype": "text"},
}
NAMES = ["a", "b", "c", "d"]


def site(federation: Any, random: np.random.Generator, n: int) -> Any:
    u, v = random.normal(size=(2, n))
    data = {
        "a": 30 * u + random.normal(0, 5, n),
        "b": 5 * u - 2 * v + random.normal(0, 1, n),
        "c": 5000 + 4 * v + random.normal(0, 1, n),
        "d": random.integers(0, 30, n).astype(float),
        "single": np.full(n, 3.7),
    }
    data["b"] = np.where(random.random(n) < 0.1, np.nan, data["b"])
    return federation.table({**data, "text": [None] * n}, COLUMNS)


def pca(drive: Any, tables: dict[str, Any], smallest: int = 1, **params: Any) -> dict[str, Any]:
    cohort = Cohort(tuple(tables), next(iter(tables.values())).schema, 0, smallest)
    return drive(build("statistics.pca", {"columns": NAMES, **params}).coordinate(cohort), tables).result["pca"]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.sampled_from([0, 1, 40, 150]), min_size=1, max_size=4).filter(lambda s: sum(s) > 39),
    standardise=st.booleans(),
)
def test_equals_scikit_learn_on_pooled_complete_rows(
    federation: Any, drive: Any, seed: int, sizes: list[int], standardise: bool
) -> None:
    random = np.random.default_rng(seed)
    tables = {f"s{i}": site(federation, random, n) for i, n in enumerate(sizes)}
    found, whole = pca(drive, tables, standardise=standardise), concatenate(list(tables.values()))
    x = np.column_stack([whole[name] for name in NAMES])
    x = x[~np.isnan(x).any(axis=1)]
    scale = x.std(axis=0, ddof=1) if standardise else np.ones(4)
    fitted = PCA().fit((x - x.mean(axis=0)) / scale)
    assert found["columns"] == NAMES
    assert found["rows"] == len(x)
    np.testing.assert_allclose(found["mean"], x.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["scale"], scale, rtol=1e-9)
    np.testing.assert_allclose(found["eigenvalues"], fitted.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(found["explained_share"], fitted.explained_variance_ratio_, rtol=1e-9)
    loadings = np.array(found["loadings"])
    gap = np.abs(np.diff(fitted.explained_variance_)).min() / fitted.explained_variance_[0]
    np.testing.assert_allclose(np.abs((loadings * fitted.components_).sum(axis=1)), 1, atol=1e-9)
    flipped = fitted.components_ * np.sign((loadings * fitted.components_).sum(axis=1))[:, None]
    np.testing.assert_allclose(loadings, flipped, atol=1e-11 / gap + 1e-9)
    assert (loadings[np.arange(4), np.abs(loadings).argmax(axis=1)] > 0).all()


def test_components_and_columns_that_do_not_vary(federation: Any, drive: Any) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), 50) for i in range(3)}
    whole, some = pca(drive, tables), pca(drive, tables, columns=["a", "single", "b", "c", "d"], components=2)
    assert some["columns"] == NAMES
    assert "single" in some["notes"][0]
    assert some["eigenvalues"] == pytest.approx(whole["eigenvalues"][:2], rel=1e-9)
    assert np.shape(some["loadings"]) == (2, 4)


def test_the_sign_of_equal_loadings_is_settled(federation: Any, drive: Any) -> None:
    """Two standardised columns always load alike: rounding must not choose the sign."""
    for seed in range(10):
        tables = {"s": site(federation, np.random.default_rng(seed), 50)}
        loadings = np.array(pca(drive, tables, columns=["a", "d"])["loadings"])
        assert (loadings[:, 0] > 0).all()


def test_nothing_is_told_of_a_cohort_with_few_rows(federation: Any, drive: Any) -> None:
    found = pca(drive, {"s": site(federation, np.random.default_rng(1), 20)}, smallest=50)
    assert (found["eigenvalues"], found["loadings"], found["mean"], found["rows"]) == ([], [], [], None)
    assert "withheld" in found["notes"][0]


def test_runs_in_a_whole_federation(federation: Any, drive: Any) -> None:
    tables = {f"s{i}": site(federation, np.random.default_rng(i), 40) for i in range(3)}
    found = federation.run(federation.plan("statistics.pca", {"columns": NAMES}, tables), tables)["result"]["pca"]
    assert found == pca(drive, tables)
    with pytest.raises(PlanError) as caught:
        federation.run(federation.plan("statistics.pca", {"columns": ["a", "text"]}, tables), {"s0": tables["s0"]})
    assert (caught.value.code, caught.value.field) == ("plan.bad-column", "text")
