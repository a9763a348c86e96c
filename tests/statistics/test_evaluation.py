"""Evaluation equals scikit-learn on the pooled held-out rows; AUC and KS within their stated bounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from sklearn import metrics as sk

from atoll.contract.errors import SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table, concatenate
from atoll.models.model import make
from atoll.runtime.policy import Policy
from atoll.statistics.error_sums import FAR
from atoll.statistics.scores import binary_metrics

from .evaluated import BINARY, COUNT, NAN, REAL, X, binary_sites, evaluate, model_of

SITES = st.lists(st.integers(0, 80), min_size=2, max_size=4).filter(lambda sizes: sum(sizes[1:]) > 0)


@settings(max_examples=30)
@given(st.integers(0, 2**32), SITES, st.booleans(), st.sampled_from([10, 64, 1024]), st.floats(-8, 8))
def test_binary_metrics_equal_scikit_learn(
    federation: Any, drive: Any, seed: int, sizes: list[int], ties: bool, bins: int, slope: float
) -> None:
    holdouts = binary_sites(federation, seed, sizes, ties)
    model = model_of("logistic", holdouts["s0"], [0.3, slope])
    found = evaluate(drive, model, holdouts, bins=bins)
    pooled = concatenate(list(holdouts.values()))
    y, p = pooled["y"], model.predict(pooled)
    got = found["pooled"]
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(y, p >= 0.5), rel=1e-12)
    assert got["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=[0, 1]), rel=1e-12)
    assert got["brier"] == pytest.approx(np.mean((p - y) ** 2), rel=1e-12)
    assert got["brier"] == pytest.approx(sk.brier_score_loss(y, p, pos_label=1), rel=1e-12)
    assert got["f1"] == pytest.approx(sk.f1_score(y, p >= 0.5, zero_division=np.nan), rel=1e-12, nan_ok=True)
    if len(set(y)) == 2:
        assert abs(got["auc"] - sk.roc_auc_score(y, p)) <= got["auc_error"] + 1e-12
        exact = ks_2samp(p[y == 1], p[y == 0]).statistic
        place = np.minimum((p * bins).astype(int), bins - 1)
        shares = [np.bincount(place[y == v], minlength=bins) / (y == v).sum() for v in (0, 1)]
        assert exact - np.maximum(*shares).max() - 1e-12 <= got["ks"] <= exact + 1e-12
    else:
        assert all(math.isnan(got[name]) for name in ("auc", "ks", "auc_error"))
    _check_curves(found["curves"], y, p)
    for site, own in found["own"].items():
        _check_own(own, holdouts[site]["y"], model.predict(holdouts[site]))
    assert list(found["own"]) == list(holdouts)


def _check_own(own: dict[str, float], y: np.ndarray, p: np.ndarray) -> None:
    assert own["rows"] == len(y)
    assert set(own) == {"rows", "auc", "ks", "accuracy", "f1", "log_loss", "brier"}
    if not len(y):
        assert all(math.isnan(value) for name, value in own.items() if name != "rows")
        return
    assert own["accuracy"] == pytest.approx(sk.accuracy_score(y, p >= 0.5), rel=1e-12)
    assert own["log_loss"] == pytest.approx(sk.log_loss(y, p, labels=[0, 1]), rel=1e-12)
    assert own["brier"] == pytest.approx(np.mean((p - y) ** 2), rel=1e-12)
    assert own["f1"] == pytest.approx(sk.f1_score(y, p >= 0.5, zero_division=np.nan), rel=1e-12, nan_ok=True)
    if len(set(y)) == 2:
        assert own["auc"] == pytest.approx(sk.roc_auc_score(y, p), rel=1e-12)
        assert own["ks"] == pytest.approx(ks_2samp(p[y == 1], p[y == 0]).statistic, rel=1e-12)
    else:
        assert math.isnan(own["auc"])
        assert math.isnan(own["ks"])


def _check_curves(curves: dict[str, Any], y: np.ndarray, p: np.ndarray) -> None:
    calibration = curves["calibration"]
    assert sum(group["rows"] for group in calibration) == len(y)
    assert sum(group["rows"] * group["predicted"] for group in calibration) == pytest.approx(p.sum(), rel=1e-12)
    assert sum(group["rows"] * group["observed"] for group in calibration) == pytest.approx(y.sum(), rel=1e-12)
    roc = curves["roc"]
    for rate in (roc["false_positive_rate"], roc["true_positive_rate"]):
        assert rate[0] == 0
        assert all(np.diff(rate) >= 0)
        assert rate[-1] in (0, 1)
    assert len(roc["false_positive_rate"]) == len(roc["true_positive_rate"])


def test_auc_is_the_area_under_the_curve_that_is_drawn(federation: Any, drive: Any) -> None:
    holdouts = binary_sites(federation, 4, [30, 90, 60], ties=False)
    found = evaluate(drive, model_of("logistic", holdouts["s0"], [0, 6]), holdouts)
    area = sk.auc(found["curves"]["roc"]["false_positive_rate"], found["curves"]["roc"]["true_positive_rate"])
    assert area == pytest.approx(found["pooled"]["auc"], rel=1e-12)


def test_metrics_of_hopeless_predictions_are_finite() -> None:
    y, p = np.array([1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])
    found = binary_metrics(y, p)
    assert found["log_loss"] == pytest.approx(100 / 3)  # 50 for each certain mistake
    assert found["auc"] == 0.25


def test_a_site_that_does_not_share_its_metrics_is_absent_and_nothing_else_changes(federation: Any) -> None:
    random = np.random.default_rng(6)
    tables = {}
    for name in ("a", "b", "c"):
        x = random.normal(0, 3, 60).clip(-10, 10)
        tables[name] = federation.table({"x": x, "y": (random.random(60) < 1 / (1 + np.exp(-x))) * 1.0}, BINARY)
    params = {"family": "logistic", "target": "y", "features": ["x"]}
    plan = federation.plan("horizontal.glm", params, tables, run={"holdout": 0.3, "seed": 1})
    shared = federation.run(plan, tables)
    withheld = federation.run(plan, tables, {"b": Policy.sandbox().model_copy(update={"share": ()})})
    assert list(shared["evaluation"]["own"]) == ["a", "b", "c"]
    assert list(withheld["evaluation"]["own"]) == ["a", "c"]
    assert withheld["evaluation"]["own"]["c"] == shared["evaluation"]["own"]["c"]
    for part in ("pooled", "curves"):
        assert withheld["evaluation"][part] == shared["evaluation"][part]
    assert withheld["result"]["table"] == shared["result"]["table"]
    assert {"rows", "auc"} <= set(shared["evaluation"]["own"]["b"])
    few = federation.run(plan, tables, {"b": Policy.sandbox().model_copy(update={"share": ("metrics",)})})
    assert set(shared["evaluation"]["own"]["b"]) - set(few["evaluation"]["own"]["b"]) == {"rows"}
    federation.run(plan, tables, {"b": Policy.sandbox().model_copy(update={"share": ()})})
    own = [body for body in federation.releases() if body["handler"] == "own"]
    assert [body["site"] for body in own] == ["a", "c"]
    nobody = dict.fromkeys(tables, Policy.sandbox().model_copy(update={"share": ()}))
    assert federation.run(plan, tables, nobody)["evaluation"]["own"] == {}
    assert federation.run(plan, tables, nobody)["evaluation"]["pooled"] == shared["evaluation"]["pooled"]


def test_sites_are_not_asked_for_their_own_metrics_unless_wanted(federation: Any, drive: Any) -> None:
    holdouts = binary_sites(federation, 4, [30, 90], ties=False)
    found = evaluate(drive, model_of("logistic", holdouts["s0"], [0, 1]), holdouts, own=False)
    assert found["own"] == {}


@pytest.mark.parametrize("family", ["linear", "poisson"])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), sizes=SITES)
def test_regression_metrics_equal_scikit_learn(
    federation: Any, drive: Any, family: str, seed: int, sizes: list[int]
) -> None:
    random = np.random.default_rng(seed)
    holdouts = {}
    for i, n in enumerate(sizes):
        x = random.uniform(-10, 10, n)
        y = (x + random.normal(i, 2, n)) if family == "linear" else np.minimum(random.poisson(np.exp(0.2 * x)), 60.0)
        holdouts[f"s{i}"] = federation.table({"x": x, "y": y}, REAL if family == "linear" else COUNT)
    model = model_of(family, holdouts["s0"], [0.4, 1.5])
    found = evaluate(drive, model, holdouts)
    pooled = concatenate(list(holdouts.values()))
    for own, table in [(found["pooled"], pooled), *[(found["own"][n], t) for n, t in holdouts.items()]]:
        if len(table) == 0:
            assert all(math.isnan(own[name]) for name in ("mae", "rmse", "r2"))
            continue
        y, p = table["y"], model.predict(table)
        assert own["mae"] == pytest.approx(sk.mean_absolute_error(y, p), rel=1e-12)
        assert own["rmse"] == pytest.approx(sk.root_mean_squared_error(y, p), rel=1e-12)
        if len(set(y)) > 1:
            assert own["r2"] == pytest.approx(sk.r2_score(y, p), rel=1e-9, abs=1e-9)
    assert found["curves"] == {}


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 17.3, -49.9])
def test_one_value_of_the_target_has_no_r2(federation: Any, drive: Any, value: float) -> None:
    """Not even when rounding leaves a little spread."""
    for n in (1, 3, 7, 29):
        holdouts = {"a": federation.table({"x": np.linspace(-9, 9, n), "y": np.full(n, value)}, REAL)}
        found = evaluate(drive, model_of("linear", holdouts["a"], [0.4, 1.5]), holdouts)
        assert math.isnan(found["pooled"]["r2"])
        assert math.isnan(found["own"]["a"]["r2"])


@pytest.mark.parametrize("hole", ["x", "y"])
def test_missing_cells_in_held_out_rows_are_an_error(federation: Any, drive: Any, hole: str) -> None:
    data = {"x": np.array([1.0, 2.0, 3.0]), "y": np.array([0.0, 1.0, 1.0])}
    data[hole][1] = NAN
    holdouts = {"a": federation.table(data, BINARY)}
    with pytest.raises(SchemaError) as caught:
        evaluate(drive, model_of("logistic", holdouts["a"], [0, 1]), holdouts)
    assert caught.value.code == "schema.missing"


def test_a_network_is_evaluated_as_any_model_is(federation: Any, drive: Any) -> None:
    pytest.importorskip("torch")
    random, tables = np.random.default_rng(0), {}
    columns = {"image": Column(dtype="image", shape=(6, 6)), "y": Column(**BINARY["y"])}
    for site in ("a", "b"):
        images = random.integers(0, 256, (50, 6, 6), np.uint8)
        data = {"image": images, "y": (images.mean((1, 2)) > 127).astype(float)}
        tables[site] = Table(TableSchema(name="test", columns=columns), data)
    model = make({"kind": "cnn", "image": "image", "target": "y", "channels": [2]}, tables["a"].schema)
    model = model.with_weights(model.initial(1))
    found = evaluate(drive, model, tables)  # type: ignore[arg-type]
    pooled = concatenate(list(tables.values()))
    y, p = pooled["y"], model.predict(pooled)
    assert found["pooled"]["accuracy"] == pytest.approx(sk.accuracy_score(y, p >= 0.5), rel=1e-12)
    assert abs(found["pooled"]["auc"] - sk.roc_auc_score(y, p)) <= found["pooled"]["auc_error"] + 1e-12
    assert set(found["own"]) == {"a", "b"}


def test_predictions_far_beyond_the_target_count_as_far(federation: Any, drive: Any) -> None:
    table = federation.table({"x": [10.0], "y": [50.0]}, REAL)
    found = evaluate(drive, model_of("linear", table, [0, -1e9]), {"a": table})
    assert found["pooled"]["mae"] == found["own"]["a"]["mae"] == (FAR + 1) * 50


# ---------------------------------------------------------------- classes, several targets, personal models

CLASSES = {**X, "y": {"dtype": "text", "values": ["calm", "mild", "wild"], "role": "label"}}
SEVERAL = {**X, "u": {"range": [-50, 50], "role": "label"}, "v": {"range": [0, 4], "role": "label"}}
MLP = {"kind": "mlp", "features": ["x"], "hidden": [4]}


def random_model(table: Table, target: Any, seed: int = 1) -> Any:
    made = make({**MLP, "target": target}, table.schema)
    return made.with_weights(np.random.default_rng(seed).normal(size=made.weights.shape))


def test_class_metrics_equal_scikit_learn(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(4)
    names = np.array(CLASSES["y"]["values"], object)
    holdouts = {
        f"s{i}": federation.table({"x": random.uniform(-9, 9, n), "y": names[random.integers(0, 3 - i, n)]}, CLASSES)
        for i, n in enumerate((50, 31, 0))
    }
    model = random_model(holdouts["s0"], "y")
    found = evaluate(drive, model, holdouts)
    y = np.concatenate([table.codes("y") for table in holdouts.values()])
    p = np.concatenate([model.predict(table) for table in holdouts.values()])
    called = p.argmax(1)
    assert found["pooled"] == {
        "accuracy": pytest.approx(sk.accuracy_score(y, called), rel=1e-12),
        "macro_f1": pytest.approx(sk.f1_score(y, called, average="macro", labels=[0, 1, 2]), rel=1e-12),
        "balanced_accuracy": pytest.approx(sk.balanced_accuracy_score(y, called), rel=1e-12),
        "log_loss": pytest.approx(sk.log_loss(y, p, labels=[0, 1, 2]), rel=1e-6),
    }
    assert found["own"]["s1"]["accuracy"] == pytest.approx(sk.accuracy_score(y[50:], called[50:]), rel=1e-12)
    assert math.isnan(found["own"]["s2"]["accuracy"])


def test_each_of_several_targets_is_scored(federation: Any, drive: Any) -> None:
    random = np.random.default_rng(5)
    holdouts = {
        f"s{i}": federation.table(
            {"x": random.uniform(-9, 9, n), "u": random.uniform(-50, 50, n), "v": random.uniform(0, 4, n)}, SEVERAL
        )
        for i, n in enumerate((40, 25))
    }
    model = random_model(holdouts["s0"], ["u", "v"])
    found = evaluate(drive, model, holdouts)["pooled"]
    pooled = concatenate(list(holdouts.values()))
    p, errors = model.predict(pooled), {}
    for i, name in enumerate(("u", "v")):
        errors[name] = sk.mean_absolute_error(pooled[name], p[:, i])
        assert found[f"mae {name}"] == pytest.approx(errors[name], rel=1e-9)
        assert found[f"rmse {name}"] == pytest.approx(sk.root_mean_squared_error(pooled[name], p[:, i]), rel=1e-9)
        assert found[f"r2 {name}"] == pytest.approx(sk.r2_score(pooled[name], p[:, i]), rel=1e-9)
    assert found["mae"] == pytest.approx(np.mean(list(errors.values())), rel=1e-12)


def test_a_class_without_a_code_is_missing(federation: Any, drive: Any) -> None:
    holdouts = {"s0": federation.table({"x": [1, 2], "y": ["calm", None]}, CLASSES)}
    with pytest.raises(SchemaError) as caught:
        evaluate(drive, random_model(holdouts["s0"], "y"), holdouts)
    assert (caught.value.code, caught.value.field) == ("schema.missing", "y")
