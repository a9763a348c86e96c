"""Weights and exposures: a row counts as often as it weighs, as long as it was watched, and protects no more for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, PlanError, SchemaError
from atoll.contract.program import Cohort, build
from atoll.contract.schema import TableSchema
from atoll.data.table import Table
from atoll.models import estimator, stored
from atoll.models.trees import COVER, FEATURE, LEAF
from atoll.models.xgboost_json import to_json
from atoll.trees.objective import Fixed, make
from atoll.trees.weighted import Weighted

from .boosted_rows import COLUMNS, SIZES, params_of, rows, steps, tables_of

SORTS: list[dict[str, Any]] = [
    params_of("value"),
    params_of("binary"),
    params_of("class"),
    params_of("count", objective="poisson"),
    params_of("count", objective={"kind": "poisson", "exposure": "years"}, splits="random"),
]
EVERY = pytest.mark.parametrize("params", SORTS, ids=["squared", "logistic", "softmax", "poisson", "exposure"])
EXPOSED = params_of("count", objective={"kind": "poisson", "exposure": "years"}, weight="weight")


def tables(federation: Any, change: Any = lambda part: part, max_rows: int = 10_000) -> dict[str, Table]:
    parts = [change(rows(seed, n)) for seed, n in enumerate(SIZES)]
    return {f"s{i}": federation.table(part, COLUMNS, max_rows=max_rows) for i, part in enumerate(parts)}


def weighing(weight: Any) -> Any:
    return lambda part: {**part, "weight": np.resize(weight, len(part["weight"])).astype(float)}


# ---------------------------------------------------------------- what a weight is


@EVERY
def test_weights_of_1_change_no_bit(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    apart = tables(federation, weighing(1))
    without, beside = (drive(steps(p, apart), apart).result for p in (params, {**params, "weight": "weight"}))
    assert without["model"].weights.tobytes() == beside["model"].weights.tobytes()
    assert without["history"] == beside["history"]


@EVERY
def test_a_row_of_weight_2_is_two_rows(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    params = {**params, "min_rows": 1}
    times = tables(federation, weighing([1, 2, 3]))
    again = tables(federation, lambda part: {n: np.repeat(c, np.resize([1, 2, 3], len(c))) for n, c in part.items()})
    both = (({**params, "weight": "weight"}, times), (params, again))
    one, other = (drive(steps(p, t), t).result for p, t in both)
    np.testing.assert_array_equal(one["model"].words[:, :, FEATURE], other["model"].words[:, :, FEATURE])
    np.testing.assert_allclose(one["model"].weights, other["model"].weights, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one["history"], other["history"], rtol=1e-6)


@EVERY
def test_a_row_of_weight_0_is_none(federation: Any, drive: Any, params: dict[str, Any]) -> None:
    params = {**params, "weight": "weight"}
    some = tables(federation, weighing([0, 1.5, 0.5]))
    kept = {name: table.rows(np.asarray(table["weight"]) > 0) for name, table in some.items()}
    one, other = (drive(steps(params, t), t, t).result for t in (some, kept))
    assert one["model"].weights.tobytes() == other["model"].weights.tobytes()
    assert (one["history"], one["held_out"]) == (other["history"], other["held_out"])


def test_rows_without_weight_do_not_make_a_group(federation: Any, drive: Any) -> None:
    """Weights of 0 and 1 choose some rows: of them, not of all, is a leaf's smallest group."""
    apart = tables(federation, weighing([1, 0, 0, 0]))
    params = params_of("value", min_rows=1, weight="weight", max_depth=4)
    words = drive(steps(params, apart, min_group_size=12), apart).result["model"].words
    assert (words[:, :, FEATURE] >= 0).any()
    assert words[:, :, COVER][words[:, :, FEATURE] == LEAF].min() >= 12, "of squared loss the cover is the weight"


def test_more_weight_is_no_more_rows(federation: Any, drive: Any) -> None:
    apart = tables(federation, weighing(4))
    params = params_of("value", min_rows=1, weight="weight", max_depth=4)
    words = drive(steps(params, apart, min_group_size=12), apart).result["model"].words
    assert words[:, :, COVER][words[:, :, FEATURE] == LEAF].min() >= 4 * 12


@pytest.mark.parametrize("protection", ["secagg", pytest.param("paillier", marks=pytest.mark.slow)])
def test_protected_sums_give_the_pooled_rows_model(federation: Any, protection: str) -> None:
    apart, whole = tables_of(federation, (60, 40, 50))
    params = {**EXPOSED, "trees": 2, "max_depth": 2, "max_bins": 4, "features": ["a", "kind"]}
    weights = []
    for some, how in ((whole, "plain"), (apart, protection)):
        federation.run(federation.plan("trees.boosted", params, some, protection=how), some)
        weights.append(federation.store.result(federation.run_id)[1]["weights"].tobytes())
    assert weights[0] == weights[1]


def test_of_one_site_bagging_weighs_as_boosting_does(federation: Any, drive: Any) -> None:
    table = {"s0": tables(federation, weighing([0, 1, 2.5]))["s0"]}
    params = {**params_of("binary", weight="weight"), "binning": "even"}
    cohort = Cohort(("s0",), table["s0"].schema, seed=7)
    bagged = drive(build("trees.bagged", params).coordinate(cohort), table).result
    beside = drive(steps(params, table), table).result["model"]
    assert bagged["model"].weights.tobytes() == beside.weights.tobytes()
    assert bagged["rows"] == {"s0": int((np.asarray(table["s0"]["weight"]) > 0).sum())}


@pytest.mark.parametrize("most", [0.001, 1.0, 3.0, 4096.0])
@pytest.mark.parametrize("max_rows", [1000, 10_000_000])
def test_weighted_sums_fit_an_int64_and_are_as_fine_as_they_can_be(most: float, max_rows: int) -> None:
    schema = TableSchema.model_validate({"name": "t", "max_rows": max_rows, "columns": COLUMNS})
    before = Fixed.of(7.3, schema)
    after = before.times(most, schema)
    assert after.bound == 7.3 * most
    assert after.most * max_rows * 2**14 < 2**62
    assert after.most >= 2**22
    if most <= 4 and max_rows == 1000:
        assert after.unit <= before.unit


# ---------------------------------------------------------------- exposures


def test_the_model_predicts_rate_times_exposure(federation: Any, drive: Any, tmp_path: Path) -> None:
    apart, _ = tables_of(federation)
    model = drive(steps(EXPOSED, apart), apart).result["model"]
    table = apart["s0"]
    years, found = np.asarray(table["years"]), model.predict(table)
    np.testing.assert_allclose(found, np.exp(model.margins(model.inputs(table))[:, 0]) * years)
    about = {"model": {"spec": model.spec(), "layers": ["weights"]}, "schema": table.schema.model_dump(mode="json")}
    stored.save(tmp_path, about, model.arrays())
    loaded: Any = estimator.load(tmp_path)
    assert set(loaded.feature_names_in_) == {"a", "b", "n", "kind", "years"}
    frame = {name: list(table[name]) for name in loaded.feature_names_in_}
    assert loaded.predict(frame).tobytes() == found.tobytes()
    values, expected = loaded.shap_values(frame)
    np.testing.assert_allclose(np.exp(values.sum(axis=1) + expected) * years, found, rtol=1e-6)
    assert not values[:, loaded.feature_names_in_.tolist().index("years")].any()


def test_xgboost_predicts_the_rate_and_with_a_base_margin_the_count(
    federation: Any, drive: Any, tmp_path: Path
) -> None:
    xgboost = pytest.importorskip("xgboost")
    apart, _ = tables_of(federation)
    params = {**EXPOSED, "features": ["a", "b", "n"], "max_depth": 4}
    model, table = drive(steps(params, apart), apart).result["model"], apart["s0"]
    (tmp_path / "model.json").write_bytes(to_json(model, table.schema, "poisson"))
    booster = xgboost.Booster(params={"nthread": 1}, model_file=tmp_path / "model.json")
    inputs, years = model.inputs(table), np.asarray(table["years"])
    rates, counts = (
        booster.predict(xgboost.DMatrix(inputs, feature_names=["a", "b", "n"], base_margin=offset))
        for offset in (None, np.log(years))
    )
    np.testing.assert_allclose(rates, model.predict(table) / years, rtol=1e-5)
    np.testing.assert_allclose(counts, model.predict(table), rtol=1e-5)


def test_the_evaluation_is_of_counts(federation: Any) -> None:
    """Of rows watched ten times as long there are ten times as many, and the trees need not learn that."""
    apart = tables(federation, lambda part: {**part, "years": np.resize([1.0, 10], len(part["years"])),
                                             "count": np.resize([4.0, 40], len(part["years"]))})  # fmt: skip
    params = {**EXPOSED, "trees": 1, "max_depth": 1, "learning_rate": 0.01}
    plan = federation.plan("trees.boosted", params, apart, run={"holdout": 0.3, "seed": 1})
    assert federation.run(plan, apart)["evaluation"]["pooled"]["mae"] < 0.1


def test_the_base_is_the_rate_however_small_exposures_are(federation: Any) -> None:
    columns = {"count": {"range": [0, 40], "role": "label"}, "area": {"range": [0, 1e-3]}}
    table = federation.table({"count": [3.0, 5, 0], "area": [1e-4, 2e-4, 1e-4]}, columns)
    objective = make({"kind": "poisson", "exposure": "area"}, "count", table.schema)
    base = objective.base(objective.begin_sums(objective.labels(table)))
    assert np.exp(base[0]) == pytest.approx(8 / 4e-4, rel=1e-3)


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("column", "cell", "code"),
    [
        ("weight", -0.5, "bad-weight"), ("weight", 4.5, "bad-weight"), ("weight", np.inf, "bad-weight"),
        ("weight", np.nan, "missing"), ("years", np.nan, "missing"), ("years", 0.0, "bad-exposure"),
        ("years", -1.0, "bad-exposure"), ("years", np.inf, "bad-exposure"),
    ],
)  # fmt: skip
def test_a_bad_cell_is_told_by_site_and_field(federation: Any, column: str, cell: float, code: str) -> None:
    parts = [rows(seed, 40) for seed in range(3)]
    parts[1][column][7] = cell
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    with pytest.raises(AtollError) as caught:
        federation.run(federation.plan("trees.boosted", EXPOSED, apart), apart)
    found = [part for part in (caught.value, *caught.value.parts) if part.code == f"schema.{code}"]
    assert found and found[0].field == column and found[0].where["site"] == "s1" and found[0].remedy


@pytest.mark.parametrize("cell", [np.nan, 0.0])
def test_nothing_is_predicted_without_an_exposure(federation: Any, drive: Any, cell: float) -> None:
    apart, _ = tables_of(federation, (60, 40, 50))
    model = drive(steps({**EXPOSED, "trees": 1}, apart), apart).result["model"]
    part = rows(1, 5)
    part["years"][2] = cell
    with pytest.raises(SchemaError) as caught:
        model.predict(federation.table(part, COLUMNS))
    assert caught.value.field == "years"


def test_a_cohort_without_any_weight_is_told_so(federation: Any, drive: Any) -> None:
    apart = tables(federation, weighing(0))
    with pytest.raises(SchemaError) as caught:
        drive(steps(params_of("value", weight="weight"), apart), apart)
    assert caught.value.code == "schema.no-weight"
    one = {**apart, "s1": tables(federation, weighing(1))["s1"]}
    model = drive(steps(params_of("value", weight="weight"), one), one).result["model"]
    alone = {"s1": one["s1"]}
    assert model.weights.tobytes() == drive(steps(params_of("value"), alone), alone).result["model"].weights.tobytes()


@pytest.mark.parametrize(("target", "value"), [("value", 3.3), ("binary", 0.0), ("count", 7.0)])
def test_a_label_that_is_always_the_same_is_refused_or_predicted(
    federation: Any, drive: Any, target: str, value: float
) -> None:
    """Whether weighted gradients show that it is depends on how they are rounded."""
    apart = tables(federation, lambda part: {**part, target: np.full(len(part[target]), value)})
    objective = {"objective": "poisson"} if target == "count" else {}
    try:
        model = drive(steps(params_of(target, weight="weight", **objective), apart), apart).result["model"]
    except SchemaError as error:
        assert error.code == "schema.constant-label"
    else:
        np.testing.assert_allclose(model.predict(apart["s0"]), value, atol=0.01)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"weight": "nope"}, "plan.bad-column"),
        ({"weight": "kind"}, "plan.bad-column"),
        ({"weight": "a"}, "plan.bad-column"),  # may be negative
        ({"weight": "value"}, "plan.bad-column"),
        ({"weight": "weight", "objective": "quantile"}, "trees.unweighted"),
        ({"weight": "weight", "objective": {"kind": "cox", "event": "binary"}}, "trees.unweighted"),
        ({"objective": {"kind": "poisson", "exposure": "nope"}, "target": "count"}, "plan.bad-column"),
        ({"objective": {"kind": "poisson", "exposure": "count"}, "target": "count"}, "plan.bad-column"),
        ({"objective": {"kind": "squared", "exposure": "years"}}, "plan.unknown-key"),
        ({"objective": {"kind": "poisson", "exposure": "years"}, "target": "count", "weight": "years"},
         "plan.bad-column"),
    ],
)  # fmt: skip
def test_columns_that_do_not_suit_are_refused_before_data_is_read(
    federation: Any, more: dict[str, Any], code: str
) -> None:
    apart, _ = tables_of(federation)
    with pytest.raises(PlanError) as caught:
        next(steps({**params_of("value"), **more}, apart))
    assert code in (caught.value.code, *(part.code for part in caught.value.parts))


def test_no_column_that_an_objective_reads_is_a_feature_by_default(federation: Any) -> None:
    apart, _ = tables_of(federation)
    schema = next(iter(apart.values())).schema
    asked = build("trees.boosted", {k: v for k, v in EXPOSED.items() if k != "features"})
    assert asked.params.columns(schema)[0] == ("a", "b", "n", "kind")
    plain = build("trees.boosted", {"target": "count", "objective": "poisson"})
    assert plain.params.columns(schema)[0] == ("a", "b", "n", "kind", "weight", "years")
    died = {n: {**c, "role": "feature"} if n == "binary" else c for n, c in COLUMNS.items()}
    cox = build("trees.boosted", {"target": "time", "objective": {"kind": "cox", "event": "binary"}})
    assert "binary" not in cox.params.columns(TableSchema.model_validate({"name": "t", "columns": died}))[0]


def test_integers_keep_their_bounds_whatever_the_margin(federation: Any) -> None:
    schema = tables_of(federation)[0]["s0"].schema
    objective = Weighted.of(make("logistic", "binary", schema), "weight", schema)
    random = np.random.default_rng(1)
    labels = np.column_stack([random.integers(0, 2, 400), random.choice([0, 1e-300, 1, 4.0], 400)]).astype(float)
    margin = random.choice([np.nan, np.inf, -np.inf, 0, 700, -3], (400, 1))
    g, h = objective.gradients(margin, labels, np.empty(0))
    assert (np.abs(g) <= objective.gradient.most).all() and (h >= 0).all() and (h <= objective.hessian.most).all()
    assert np.isfinite(objective.base({n: np.array(0) for n in objective.begins})).all()
