"""Generalised linear models: derivatives against finite differences, and scaling to and fro."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.models.linear import LinearModel, Scale, feature_bounds, xy
from atoll.models.model import Examples, from_spec

FAMILIES = ("linear", "logistic", "poisson")
TARGETS: dict[str, dict[str, Any]] = {
    "linear": {"range": [-50, 50]},
    "logistic": {"dtype": "integer", "values": [0, 1]},
    "poisson": {"dtype": "integer", "range": [0, 40]},
}
FEATURES: dict[str, dict[str, Any]] = {
    "a": {"range": [-3, 5]},
    "b": {"range": [1000, 1010]},
    "c": {"dtype": "integer", "values": [1, 2, 4]},
}


def columns_of(family: str) -> dict[str, dict[str, Any]]:
    return {**FEATURES, "y": {**TARGETS[family], "role": "label"}, "t": {"dtype": "text"}, "gone": {"role": "ignore"}}


def schema_of(family: str) -> TableSchema:
    return TableSchema(name="test", columns={n: Column(**c) for n, c in columns_of(family).items()})


def model_of(family: Any) -> LinearModel:
    return LinearModel.zero(family, schema_of(family), ("a", "b", "c"), "y")


def rows_of(family: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    raw = np.column_stack([random.uniform(-3, 5, n), random.uniform(1000, 1010, n), random.choice([1, 2, 4], n)])
    y = {"linear": random.normal(0, 5, n), "logistic": random.integers(0, 2, n), "poisson": random.poisson(3, n)}
    return raw, y[family].astype(float)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.integers(0, 1000))
def test_gradient_and_curvature_are_the_losss_derivatives(family: str, weights: list[float], seed: int) -> None:
    model = model_of(family)
    raw, y = rows_of(family, 7, seed)
    design = model.design(raw)

    def total(w: np.ndarray) -> float:
        return float(model.loss(design @ w, y).sum())

    w = np.array(weights)
    mean = model.mean(design @ w)
    gradient = design.T @ (mean - y)
    hessian = (design * model.curvature(mean)[:, None]).T @ design
    step = 1e-5
    for i in range(len(w)):
        e = np.eye(len(w))[i] * step
        slope = (total(w + e) - total(w - e)) / (2 * step)
        assert gradient[i] == pytest.approx(slope, rel=1e-5, abs=1e-4)
        up, down = (design.T @ (model.mean(design @ (w + s * e)) - y) for s in (1, -1))
        assert np.allclose(hessian[i], (up - down) / (2 * step), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_textbooks(family: str) -> None:
    model = model_of(family)
    eta, y = np.linspace(-3, 3, 7), np.array([0, 1, 1, 0, 1, 0, 1.0])
    mean = model.mean(eta)
    if family == "linear":
        wanted_mean, wanted = eta, (y - eta) ** 2 / 2
    elif family == "logistic":
        wanted_mean = 1 / (1 + np.exp(-eta))
        wanted = -(y * np.log(wanted_mean) + (1 - y) * np.log(1 - wanted_mean))
    else:
        wanted_mean = np.exp(eta)
        wanted = wanted_mean - y * np.log(wanted_mean)
    assert np.allclose(mean, wanted_mean, rtol=1e-14)
    assert np.allclose(model.loss(eta, y), wanted, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_overflows_far_out(family: str) -> None:
    model = model_of(family)
    eta = np.array([-1e6, -800.0, 800.0, 1e6])
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        mean, loss = model.mean(eta), model.loss(eta, np.ones(4))
    assert np.isfinite(mean).all()
    assert np.isfinite(loss).all()
    if family == "logistic":
        assert ((mean >= 0) & (mean <= 1)).all()


def test_the_design_lies_within_one_of_zero() -> None:
    """Every declared bound rests on it."""
    model = model_of("linear")
    corners = np.array([[-3, 1000, 1], [5, 1010, 4], [1, 1005, 2.5]])
    assert model.design(corners).tolist() == [[1, -1, -1, -1], [1, 1, 1, 1], [1, 0, 0, 0]]


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=4, max_size=4), st.integers(0, 1000))
def test_coefficients_are_in_the_columns_own_units(weights: list[float], seed: int) -> None:
    model = model_of("linear").with_weights(np.array(weights))
    raw, _ = rows_of("linear", 20, seed)
    intercept, slopes = model.coefficients()
    scale = 1 + np.abs(slopes) @ np.array([5, 1010, 4])
    assert np.allclose(intercept + raw @ slopes, model.design(raw) @ model.weights, rtol=0, atol=1e-12 * scale)
    assert np.allclose(model.to_raw() @ model.weights, [intercept, *slopes], rtol=1e-14)
    back = np.linalg.solve(model.to_raw(), [intercept, *slopes])
    assert np.allclose(back, weights, rtol=1e-9, atol=1e-9)


def test_a_one_value_column_can_still_be_scaled() -> None:
    schema = TableSchema(name="test", columns={"k": Column(dtype="integer", values=(7,))})
    assert feature_bounds(schema, "k") == (6.5, 7.5)
    scale = Scale.of(schema, ("k",))
    assert (scale.middle, scale.half) == ([7.0], [0.5])


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_batches_and_the_spec_round_trip(federation: Any, family: str) -> None:
    raw, y = rows_of(family, 100, 3)
    data = {**dict(zip("abc", raw.T, strict=True)), "y": y, "t": [None] * 100}
    table = federation.table(data, columns_of(family))
    model = model_of(family).with_weights(np.array([0.3, -0.2, 0.1, 0.5]))
    wanted = model.mean(model.design(raw) @ model.weights)
    assert np.array_equal(model.predict(table), wanted)
    assert model.predict(table.rows(np.zeros(100, bool))).shape == (0,)
    parts = list(xy(model, table, 33))
    assert [len(part_y) for _, part_y in parts] == [33, 33, 33, 1]
    assert np.array_equal(np.concatenate([design for design, _ in parts]), model.design(raw))
    assert np.array_equal(np.concatenate([part_y for _, part_y in parts]), y)
    again = from_spec(model.spec(), table.schema, {"weights": model.weights})
    assert again.spec() == model.spec()
    assert np.array_equal(again.predict(table), wanted)
    with pytest.raises(PlanError) as caught:
        from_spec(model.spec(), table.schema, {"weights": np.zeros(3)})
    assert caught.value.code == "model.shape"


def test_missing_cells_are_an_error_that_names_the_columns(federation: Any) -> None:
    raw, y = rows_of("linear", 10, 3)
    raw[3, 1], y[4] = math.nan, math.nan
    data = {**dict(zip("abc", raw.T, strict=True)), "y": y, "t": [None] * 10}
    with pytest.raises(SchemaError) as caught:
        list(xy(model_of("linear"), federation.table(data, columns_of("linear"))))
    assert (caught.value.code, caught.value.field) == ("schema.missing", "b, y")


@pytest.mark.parametrize(
    ("family", "features", "target", "code", "field"),
    [
        ("linear", ("a", "z"), "y", "plan.bad-column", "z"),
        ("linear", ("a", "t"), "y", "plan.bad-column", "t"),
        ("linear", ("a", "gone"), "y", "plan.bad-column", "gone"),
        ("linear", ("a",), "t", "plan.bad-column", "t"),
        ("linear", ("a",), "gone", "plan.bad-column", "gone"),
        ("linear", (), "y", "plan.no-features", "features"),
        ("logistic", ("a",), "b", "plan.bad-target", "b"),
        ("poisson", ("b",), "a", "plan.bad-target", "a"),
    ],
)
def test_models_that_cannot_be_are_refused_without_data(
    family: Any, features: tuple[str, ...], target: str, code: str, field: str
) -> None:
    with pytest.raises(PlanError) as caught:
        LinearModel.zero(family, schema_of("linear"), features, target)
    assert (caught.value.code, caught.value.field) == (code, field)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-2, 2), min_size=4, max_size=4), st.integers(0, 1000), st.floats(1e-3, 20))
def test_clipping_in_closed_form_equals_clipping_one_after_another(
    family: str, weights: list[float], seed: int, clip: float
) -> None:
    model, (raw, y) = model_of(family), rows_of(family, 9, seed)
    batch = Examples((model.design(raw),), y)
    total, clipped, losses = np.zeros(4), 0, 0.0
    for i in range(9):
        loss, gradient = model.loss_and_gradient(np.array(weights), batch.take(slice(i, i + 1)))
        norm = float(np.linalg.norm(gradient))
        total += gradient * min(1, clip / norm if norm else 1)
        clipped += norm > clip * (1 + 1e-12)
        losses += loss
    found = model.clipped_gradient_sum(np.array(weights), batch, clip)
    assert np.allclose(found[0], total, rtol=1e-9, atol=1e-9)
    assert abs(found[1] - clipped) <= 1  # a norm of exactly the clip
    assert found[2] == pytest.approx(losses, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_closed_form_equal_automatic_ones(family: str) -> None:
    torch = pytest.importorskip("torch")
    model, (raw, y) = model_of(family), rows_of(family, 20, 5)
    design, start = model.design(raw), np.array([0.3, -0.2, 0.4, 0.1])
    w = torch.tensor(start, requires_grad=True)
    eta, labels = torch.from_numpy(design) @ w, torch.from_numpy(y)
    loss = {
        "linear": lambda: (labels - eta).square() / 2,
        "logistic": lambda: torch.nn.functional.binary_cross_entropy_with_logits(eta, labels, reduction="none"),
        "poisson": lambda: torch.nn.functional.poisson_nll_loss(eta, labels, reduction="none"),
    }[family]()
    loss.mean().backward()
    found = model.loss_and_gradient(start, Examples((design,), y))
    assert found[0] == pytest.approx(float(loss.mean().detach()), rel=1e-12)
    assert np.allclose(found[1], w.grad.numpy(), rtol=1e-12, atol=1e-14)
