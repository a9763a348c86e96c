"""Federated GLMs equal the pooled fits of statsmodels and scikit-learn; what cannot be fitted is refused."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

from atoll.contract.errors import AtollError, DisclosureError
from atoll.contract.program import Cohort, build
from atoll.data.sources import SourceSpec
from atoll.data.table import Table, concatenate
from atoll.runtime.policy import Policy

NAN = float("nan")
FAMILIES = ("linear", "logistic", "poisson")
FEATURES = ("age", "dose", "sex")
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"range": [-500, 500]},
    "logistic": {"dtype": "integer", "values": [0, 1]},
    "poisson": {"dtype": "integer", "range": [0, 200]},
}
SKEWED = [(60, 0.2), (25, 0.5), (140, 0.9)]


def columns_of(family: str) -> dict[str, dict[str, Any]]:
    return {
        "age": {"range": [0, 120]},
        "dose": {"range": [0, 0.5]},
        "sex": {"dtype": "integer", "values": [0, 1]},
        "y": {**TARGETS[family], "role": "label"},
    }


def site(federation: Any, family: str, random: np.random.Generator, n: int, shift: float) -> Table:
    """One site's rows; sites differ in all distributions (non-IID)."""
    age = np.clip(random.normal(30 + 40 * shift, 12, n), 0, 120)
    dose = random.uniform(0, 0.1 + 0.4 * shift, n)
    sex = (random.random(n) < 0.2 + 0.6 * shift).astype(float)
    eta = 0.3 + 0.02 * (age - 50) - 2 * dose + 0.7 * sex + shift
    y = {
        "linear": np.clip(10 * eta + random.normal(0, 3, n), -500, 500),
        "logistic": (random.random(n) < 1 / (1 + np.exp(1 - eta))).astype(float),
        "poisson": np.minimum(random.poisson(np.exp(eta)), 200).astype(float),
    }[family]
    return federation.table({"age": age, "dose": dose, "sex": sex, "y": y}, columns_of(family))


def sites(federation: Any, family: str, seed: int = 1, sizes: Any = SKEWED) -> dict[str, Table]:
    random = np.random.default_rng(seed)
    return {f"s{i}": site(federation, family, random, n, shift) for i, (n, shift) in enumerate(sizes)}


def params_of(family: str, **more: Any) -> dict[str, Any]:
    return {"family": family, "target": "y", "features": list(FEATURES), **more}


def fit(drive: Any, tables: dict[str, Table], params: dict[str, Any], **options: Any) -> Any:
    schema = next(iter(tables.values())).schema
    return drive(build("horizontal.glm", params).coordinate(Cohort(tuple(tables), schema)), tables, **options)


def pooled_fit(family: str, table: Table, features: tuple[str, ...] = FEATURES) -> Any:
    """statsmodels on the pooled rows: linear by QR, the others by Newton's method on raw columns."""
    x = sm.add_constant(np.column_stack([table[name] for name in features]), has_constant="add")
    if family == "linear":
        return sm.OLS(table["y"], x).fit()
    if family == "logistic":
        return sm.Logit(table["y"], x).fit(disp=0, method="newton", tol=1e-14, maxiter=100)
    return sm.GLM(table["y"], x, family=sm.families.Poisson()).fit(tol=1e-14, maxiter=100)


def assert_equals_statsmodels(found: list[dict[str, Any]], wanted: Any, rel: float = 1e-8) -> None:
    for row, value, error, z, p in zip(found, wanted.params, wanted.bse, wanted.tvalues, wanted.pvalues, strict=True):
        assert row["coefficient"] == pytest.approx(value, rel=rel, abs=rel * error)
        assert row["std_error"] == pytest.approx(error, rel=10 * rel)
        assert row["z"] == pytest.approx(z, rel=20 * rel, abs=20 * rel)
        # the relative error of a p-value is that of z, times z²
        assert row["p_value"] == pytest.approx(p, rel=20 * rel * (1 + z**2), abs=1e-300)


# ---------------------------------------------------------------- equal to the pooled fit


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), shifts=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_equals_statsmodels(federation: Any, drive: Any, family: str, seed: int, shifts: list[float]) -> None:
    tables = sites(federation, family, seed, [(120 + 10 * i, shift) for i, shift in enumerate(shifts)])
    driven = fit(drive, tables, params_of(family))
    assert_equals_statsmodels(driven.result["table"], pooled_fit(family, concatenate(list(tables.values()))))
    assert driven.result["iterations"] <= 10
    assert driven.result["rows"] == sum(len(table) for table in tables.values())
    assert [row["name"] for row in driven.result["table"]] == ["intercept", *FEATURES]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_statsmodels_through_the_whole_federation(federation: Any, family: str) -> None:
    """With codec, ledger and egress gate; and nothing had to be clipped to its declared bound."""
    tables = sites(federation, family)
    outcome = federation.run(federation.plan("horizontal.glm", params_of(family), tables), tables)
    assert_equals_statsmodels(outcome["result"]["table"], pooled_fit(family, concatenate(list(tables.values()))))
    bodies = federation.releases()
    assert len(bodies) == 3 * (1 + outcome["result"]["iterations"])
    assert all(body["clipped"] == 0 for body in bodies)
    assert [m["value"] for m in federation.store.metrics(federation.run_id)] == outcome["result"]["history"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("l2", [0.01, 1.0, 100.0])
def test_equals_scikit_learn_with_a_penalty(federation: Any, drive: Any, family: str, l2: float) -> None:
    tables = sites(federation, family)
    found = fit(drive, tables, params_of(family, l2=l2)).result
    pooled = concatenate(list(tables.values()))
    x, y = np.column_stack([pooled[name] for name in FEATURES]), pooled["y"]
    if family == "logistic":
        reference: Any = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    elif family == "poisson":
        reference = PoissonRegressor(alpha=l2 / len(y), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    else:
        reference = Ridge(alpha=l2, solver="svd")
    reference.fit(x, y)
    slopes = [row["coefficient"] for row in found["table"]]
    assert np.allclose(slopes, [np.squeeze(reference.intercept_), *np.ravel(reference.coef_)], rtol=1e-8, atol=1e-10)
    assert all("p_value" not in row for row in found["table"])  # biased estimates have no Wald tests


@pytest.mark.parametrize("family", FAMILIES)
def test_how_rows_are_spread_over_sites_does_not_matter(federation: Any, drive: Any, family: str) -> None:
    pooled = concatenate(list(sites(federation, family).values()))
    alone = fit(drive, {"all": pooled}, params_of(family)).result
    many = {f"s{i}": pooled.rows(np.arange(len(pooled)) % 17 == i) for i in range(17)}
    spread = fit(drive, many, params_of(family)).result
    for one, other in zip(alone["table"], spread["table"], strict=True):
        assert one["coefficient"] == pytest.approx(other["coefficient"], rel=1e-9, abs=1e-9)
    assert alone["iterations"] == spread["iterations"]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e6])
def test_linear_regression_does_not_depend_on_the_targets_unit(federation: Any, drive: Any, scale: float) -> None:
    tables = sites(federation, "linear")
    columns = {**columns_of("linear"), "y": {"range": [-500 * scale, 500 * scale], "role": "label"}}
    scaled = {n: federation.table({**t.columns, "y": t["y"] * scale}, columns) for n, t in tables.items()}
    found = fit(drive, scaled, params_of("linear")).result["table"]
    assert_equals_statsmodels(found, pooled_fit("linear", concatenate(list(scaled.values()))))


def test_a_target_far_from_zero_with_little_spread(federation: Any, drive: Any) -> None:
    """A pressure around 101 325 Pa that varies by milli-pascals is no constant label."""
    tables = sites(federation, "linear")
    columns = {**columns_of("linear"), "y": {"range": [101_324, 101_326], "role": "label"}}
    moved = {n: federation.table({**t.columns, "y": 101_325 + t["y"] * 1e-4}, columns) for n, t in tables.items()}
    found = fit(drive, moved, params_of("linear")).result["table"]
    assert_equals_statsmodels(found, pooled_fit("linear", concatenate(list(moved.values()))), rel=1e-6)


def test_an_exact_linear_relation(federation: Any, drive: Any) -> None:
    tables = sites(federation, "linear")
    exact = {n: Table(t.schema, {**t.columns, "y": 3 - 2 * t["age"] + 7 * t["sex"]}) for n, t in tables.items()}
    found = fit(drive, exact, params_of("linear")).result
    assert np.allclose([row["coefficient"] for row in found["table"]], [3, -2, 0, 7], atol=1e-9)


# ---------------------------------------------------------------- odd sites


@pytest.mark.parametrize("family", FAMILIES)
def test_a_one_row_site_and_an_empty_site_count_as_what_they_are(federation: Any, drive: Any, family: str) -> None:
    tables = sites(federation, family, sizes=[*SKEWED, (1, 0.5)])
    tables["none"] = tables["s0"].rows(np.zeros(60, bool))
    found = fit(drive, tables, params_of(family)).result
    assert found["rows"] == 226
    assert_equals_statsmodels(found["table"], pooled_fit(family, concatenate(list(tables.values()))))


def test_a_one_row_site_is_refused_by_a_policy_with_a_minimum_group_size(federation: Any) -> None:
    tables = sites(federation, "logistic", sizes=[*SKEWED, (1, 0.5)])
    policies = {"s3": Policy.sandbox().model_copy(update={"min_group_size": 5})}
    with pytest.raises(DisclosureError) as caught:
        federation.run(federation.plan("horizontal.glm", params_of("logistic"), tables), tables, policies)
    assert (caught.value.code, caught.value.where["site"]) == ("disclosure.small-group", "s3")
    assert not [body for body in federation.releases() if body["site"] == "s3"]


def test_a_site_with_one_class_only_is_no_problem(federation: Any, drive: Any) -> None:
    tables = sites(federation, "logistic")
    tables["s1"] = Table(tables["s1"].schema, {**tables["s1"].columns, "y": np.zeros(len(tables["s1"]))})
    found = fit(drive, tables, params_of("logistic")).result
    assert_equals_statsmodels(found["table"], pooled_fit("logistic", concatenate(list(tables.values()))))


def test_a_feature_that_is_constant_at_one_site_only_is_no_problem(federation: Any, drive: Any) -> None:
    tables = sites(federation, "logistic")
    tables["s1"] = Table(tables["s1"].schema, {**tables["s1"].columns, "sex": np.ones(len(tables["s1"]))})
    found = fit(drive, tables, params_of("logistic")).result
    assert_equals_statsmodels(found["table"], pooled_fit("logistic", concatenate(list(tables.values()))))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_that_drops_out_leaves_the_survivors_fit(federation: Any, drive: Any, family: str) -> None:
    """Coefficients, standard errors and the number of rows are those of the sites that stayed."""
    tables = sites(federation, family)
    driven = fit(drive, tables, params_of(family), absent=lambda number: ["s0"] if number >= 2 else [])
    stayed = [tables["s1"], tables["s2"]]
    assert driven.result["rows"] == sum(map(len, stayed))
    assert_equals_statsmodels(driven.result["table"], pooled_fit(family, concatenate(stayed)))
    assert driven.result["iterations"] <= 12


@pytest.mark.parametrize("family", FAMILIES)
def test_a_site_that_drops_out_and_comes_back(federation: Any, drive: Any, family: str) -> None:
    tables = sites(federation, family)
    driven = fit(drive, tables, params_of(family), absent=lambda number: ["s2"] if number == 2 else [])
    assert_equals_statsmodels(driven.result["table"], pooled_fit(family, concatenate(list(tables.values()))))
    assert driven.result["iterations"] <= 12


# ---------------------------------------------------------------- what cannot be fitted


def error_of(drive: Any, tables: dict[str, Table], params: dict[str, Any]) -> AtollError:
    with pytest.raises(AtollError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(drive, tables, params)
    assert caught.value.remedy
    return caught.value


def changed(tables: dict[str, Table], **columns: Any) -> dict[str, Table]:
    """Every site's table with columns replaced by functions of it."""
    return {
        name: Table(table.schema, {**table.columns, **{c: f(table) for c, f in columns.items()}})
        for name, table in tables.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_label(federation: Any, drive: Any, family: str, value: float) -> None:
    tables = changed(sites(federation, family), y=lambda t: np.full(len(t), value))
    error = error_of(drive, tables, params_of(family))
    assert (error.code, error.field) == ("schema.constant-label", "y")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "make",
    [
        lambda t: t["age"] / 240,
        lambda t: 0.4 - 0.3 * t["sex"],
        lambda t: np.full(len(t), 0.3),
        lambda t: 0.1 + 0.2 * t["sex"] + t["age"] / 1200,
    ],
    ids=["a multiple", "an affine map", "a constant", "a sum of two"],
)
def test_features_that_depend_on_each_other(federation: Any, drive: Any, family: str, seed: int, make: Any) -> None:
    """Whether rounding leaves the matrix exactly singular or almost."""
    tables = changed(sites(federation, family, seed), dose=make)
    error = error_of(drive, tables, params_of(family))
    assert (error.code, error.field) == ("glm.singular", "features")
    assert "l2" in error.remedy
    assert fit(drive, tables, params_of(family, l2=0.1)).result["iterations"] <= 10


def test_labels_that_a_feature_separates(federation: Any, drive: Any) -> None:
    tables = changed(sites(federation, "logistic"), y=lambda t: (t["age"] > 55) * 1.0)
    assert {0.0, 1.0} == set(concatenate(list(tables.values()))["y"])
    error = error_of(drive, tables, params_of("logistic", max_iterations=12))  # seen long before weights run off
    assert (error.code, error.field) == ("glm.separable", "features")
    found = fit(drive, tables, params_of("logistic", l2=1.0)).result
    assert np.isfinite([row["coefficient"] for row in found["table"]]).all()


@pytest.mark.parametrize("family", ["logistic", "poisson"])
def test_labels_that_a_feature_separates_in_part(federation: Any, drive: Any, family: str) -> None:
    """All with sex = 0 have y = 0: the coefficient of sex runs off, though slowly (quasi-complete)."""
    tables = changed(sites(federation, family), y=lambda t: np.where(t["sex"] == 0, 0, t["y"]))
    assert error_of(drive, tables, params_of(family)).code == "glm.separable"
    assert error_of(drive, tables, params_of(family, max_iterations=5)).code == "glm.not-converged"


@pytest.mark.parametrize("family", ["logistic", "poisson"])
def test_an_indicator_whose_rows_all_agree(federation: Any, drive: Any, family: str) -> None:
    """Newton's steps shrink, as if it converged; but the indicator's own curvature is gone."""
    columns = {**columns_of(family), "dose": {"range": [-1, 1]}}
    tables = {}
    for name, table in sites(federation, family).items():
        marked = np.arange(len(table)) % 5 == 0
        y = np.where(marked, 0, table["y"])
        tables[name] = federation.table({**table.columns, "dose": marked * 1.0, "y": y}, columns)
    assert error_of(drive, tables, params_of(family)).code == "glm.separable"


def test_almost_separated_labels_are_still_fitted(federation: Any, drive: Any) -> None:
    """One row on the wrong side: a finite optimum, however steep."""
    tables = changed(sites(federation, "logistic"), y=lambda t: (t["age"] > 55) * 1.0)
    y = tables["s0"]["y"].copy()
    y[np.argmin(tables["s0"]["age"])] = 1
    tables["s0"] = Table(tables["s0"].schema, {**tables["s0"].columns, "y": y})
    found = fit(drive, tables, params_of("logistic")).result
    assert_equals_statsmodels(found["table"], pooled_fit("logistic", concatenate(list(tables.values()))), rel=1e-7)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_more_coefficients_than_rows(federation: Any, drive: Any, rows: int) -> None:
    error = error_of(drive, sites(federation, "linear", sizes=[(rows, 0.5)]), params_of("linear"))
    assert (error.code, error.field) == ("glm.too-few-rows", "features")


def test_too_few_iterations(federation: Any, drive: Any) -> None:
    error = error_of(drive, sites(federation, "poisson"), params_of("poisson", max_iterations=2))
    assert (error.code, error.field) == ("glm.not-converged", "max_iterations")


def test_missing_cells_are_named_and_not_shown(federation: Any) -> None:
    tables = sites(federation, "logistic")
    holes = tables["s1"]["dose"].copy()
    holes[3] = NAN
    tables["s1"] = Table(tables["s1"].schema, {**tables["s1"].columns, "dose": holes})
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("horizontal.glm", params_of("logistic"), tables), tables)
    assert (caught.value.code, caught.value.field) == ("schema.missing", "dose")
    assert caught.value.where["site"] == "s1"
    assert "impute" in caught.value.remedy


def test_labels_missing_at_one_site(federation: Any, drive: Any) -> None:
    tables = sites(federation, "logistic")
    tables["s2"] = Table(tables["s2"].schema, {**tables["s2"].columns, "y": np.full(len(tables["s2"]), NAN)})
    error = error_of(drive, tables, params_of("logistic"))
    assert (error.code, error.field) == ("schema.no-labels", "y")


def test_a_label_column_missing_at_one_site(federation: Any, tmp_path: Any) -> None:
    tables = sites(federation, "logistic")
    sources = {}
    for name, table in tables.items():
        header = [*FEATURES, "y"] if name != "s1" else list(FEATURES)
        lines = [",".join(header), *(",".join(repr(float(table[c][i])) for c in header) for i in range(len(table)))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        sources[name] = SourceSpec(path=f"{name}.csv")
    plan = federation.plan("horizontal.glm", params_of("logistic"), tables)
    with pytest.raises(AtollError) as caught:
        federation.run(plan, sources, base=tmp_path)
    assert (caught.value.code, caught.value.field) == ("schema.missing-column", "y")
    assert caught.value.where["site"] == "s1"
    sources["s1"] = sources["s0"]
    files = federation.run(plan, sources, base=tmp_path)["result"]
    memory = fit_in_memory(federation, plan, {**tables, "s1": tables["s0"]})
    assert files["table"] == memory["table"]  # text and back: the same bits


def fit_in_memory(federation: Any, plan: Any, tables: dict[str, Table]) -> Any:
    return federation.run(plan, tables)["result"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"target": "dose"}, "plan.bad-target"),
        ({"target": "z"}, "plan.bad-column"),
        ({"features": ["age", "agee"]}, "plan.bad-column"),
        ({"features": []}, "plan.bad-value"),
        ({"family": "probit"}, "plan.bad-value"),
        ({"l2": -1}, "plan.bad-value"),
        ({"ridge": 1}, "plan.unknown-key"),
    ],
)
def test_plans_that_cannot_work_are_refused_before_data_is_read(
    federation: Any, changes: dict[str, Any], code: str
) -> None:
    tables = sites(federation, "logistic")
    plan = federation.plan("horizontal.glm", {**params_of("logistic"), **changes}, tables)
    with pytest.raises(AtollError) as caught:
        federation.run(plan, tables)
    assert code in (caught.value.code, *(part.code for part in caught.value.parts))
    assert federation.releases() == []
