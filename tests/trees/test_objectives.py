"""Objectives: derivatives of what they state, exact bounded integers, base margins that are optima, mean losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from atoll.contract.errors import PlanError, SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.trees.objective import Fixed, Objective, fields, make, norms

COLUMNS: dict[str, Any] = {
    "value": {"range": [-80, 120], "role": "label"},
    "count": {"dtype": "integer", "range": [0, 40], "role": "label"},
    "binary": {"dtype": "integer", "values": [0, 1], "role": "label"},
    "kind": {"dtype": "text", "values": ["red", "green", "blue"], "role": "label"},
    "days": {"range": [0, 400], "role": "label"},
    "share": {"range": [0, 1], "role": "label"},
}
SCHEMA = TableSchema(name="t", max_rows=10_000, columns={n: Column(**c) for n, c in COLUMNS.items()})
ASKED: list[tuple[Any, str]] = [
    ("squared", "value"), ("logistic", "binary"), ("softmax", "kind"), ("poisson", "count"),
    ({"kind": "quantile", "alpha": 0.8}, "value"), ({"kind": "cox", "event": "binary"}, "days"),
]  # fmt: skip
EVERY = pytest.mark.parametrize(
    ("asked", "target"), ASKED, ids=["squared", "logistic", "softmax", "poisson", "q", "cox"]
)


def drawn(objective: Objective, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(margins, labels) as they may be."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 1, (rows, objective.outputs))
    labels = {
        "value": rng.uniform(-80, 120, rows), "count": rng.poisson(3, rows) * 1.0,
        "binary": rng.integers(0, 2, rows) * 1.0, "kind": rng.integers(0, 3, rows) * 1.0,
        "days": np.column_stack([rng.integers(0, 256, rows), rng.integers(0, 2, rows)]).astype(float),
    }[objective.target]  # fmt: skip
    return margin, labels


def shared_of(objective: Objective, margin: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return objective.shared(objective.share_sums(margin, labels))


@pytest.mark.parametrize(("asked", "target"), ASKED[:4])
def test_gradients_are_the_derivatives_of_the_stated_loss(asked: Any, target: str) -> None:
    objective = make(asked, target, SCHEMA)
    margin, labels = drawn(objective, 60)
    g, h = objective.gradients(margin, labels, np.empty(0))
    step = 1e-4
    factor = {"softmax": 2.0, "poisson": math.exp(0.7)}.get(str(asked), 1.0)  # of the Hessian, as the docstring says
    for k in range(objective.outputs):
        aside = step * np.eye(objective.outputs)[k]
        below, here, above = (objective.loss_of(margin + by * aside, labels) for by in (-1, 0, 1))
        np.testing.assert_allclose(objective.gradient.reals(g)[:, k], (above - below) / (2 * step), atol=2e-6)
        curvature = factor * (above - 2 * here + below) / step**2
        np.testing.assert_allclose(objective.hessian.reals(h)[:, k], curvature, atol=2e-3)


def test_of_the_pinball_loss_the_gradient_is_the_derivative_and_the_hessian_one() -> None:
    objective = make({"kind": "quantile", "alpha": 0.8}, "value", SCHEMA)
    margin, labels = drawn(objective, 60)
    g, h = objective.gradients(margin, labels, np.empty(0))
    slope = (objective.loss_of(margin + 1e-4, labels) - objective.loss_of(margin - 1e-4, labels)) / 2e-4
    np.testing.assert_allclose(objective.gradient.reals(g)[:, 0], slope, atol=1e-6)
    assert objective.constant and (h == 1).all() and objective.hessian.most == 1


def test_of_cox_the_gradient_is_the_derivative_of_the_partial_likelihood() -> None:
    objective = make({"kind": "cox", "event": "binary"}, "days", SCHEMA)
    margin, labels = drawn(objective, 40)
    g, h = objective.gradients(margin, labels, shared_of(objective, margin, labels))
    place, happened = labels.T

    def loss(m: np.ndarray) -> float:
        at_risk = [math.log(np.exp(m[place >= place[i]]).sum()) - m[i] for i in np.flatnonzero(happened)]
        return float(np.sum(at_risk))

    step = 1e-4
    for i in range(len(margin)):
        aside = step * (np.arange(len(margin)) == i)
        below, here, above = (loss(margin[:, 0] + by * aside) for by in (-1, 0, 1))
        assert objective.gradient.reals(g)[i, 0] == pytest.approx((above - below) / (2 * step), abs=1e-5)
        assert objective.hessian.reals(h)[i, 0] == pytest.approx((above - 2 * here + below) / step**2, abs=1e-3)
    told = objective.loss_sums(margin, labels)
    assert objective.loss(told) == pytest.approx(loss(margin[:, 0]) / happened.sum(), abs=1e-6)


MARGINS = st.floats(allow_nan=True, allow_infinity=True)


@EVERY
@given(st.lists(MARGINS, min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_integers_keep_their_bounds_whatever_the_margin_and_add_up_in_any_order(
    asked: Any, target: str, margins: list[float], seed: int
) -> None:
    objective = make(asked, target, SCHEMA)
    margin = np.resize(np.array(margins), (12, objective.outputs))
    _, labels = drawn(objective, 12, seed)
    shared = np.random.default_rng(seed).exponential(1, objective.shared_size)
    with np.errstate(all="ignore"):
        g, h = objective.gradients(margin, labels, shared)
        told = {**objective.loss_sums(margin, labels), **objective.share_sums(margin, labels)}
        parts = [objective.loss_sums(margin[rows], labels[rows]) for rows in (slice(0, 5), slice(5, 12))]
    assert g.dtype == h.dtype == np.int64 and g.shape == h.shape == margin.shape
    assert (np.abs(g) <= objective.gradient.most).all()
    assert (h >= 0).all() and (h <= objective.hessian.most).all()
    for name, sums in {**objective.losses, **objective.shares}.items():
        assert (np.abs(np.asarray(told[name])) <= 12 * sums.fixed.most).all(), name
    for name in objective.losses:
        np.testing.assert_array_equal(parts[0][name] + parts[1][name], told[name])


@EVERY
def test_a_row_changes_sums_by_no_more_than_the_norms_say(asked: Any, target: str) -> None:
    objective = make(asked, target, SCHEMA)
    margin, labels = drawn(objective, 30)
    leaf = np.random.default_rng(1).integers(0, 4, margin.shape).astype(np.int32)
    for declared, sums in (
        (objective.begins, lambda rows: objective.begin_sums(labels[rows])),
        (objective.losses, lambda rows: objective.loss_sums(5 * margin[rows], labels[rows])),
        (objective.shares, lambda rows: objective.share_sums(5 * margin[rows], labels[rows])),
        (objective.renews(4), lambda rows: objective.renew_sums(margin[rows], labels[rows], leaf[rows], 4)),
    ):
        whole, moved = sums(slice(None)), norms(declared)
        assert set(whole) == set(declared) == set(fields(declared, SCHEMA))
        for without in range(30):
            rest = sums(np.arange(30) != without)
            for name, norm in moved.items():
                change = np.asarray(whole[name], float) - np.asarray(rest[name], float)
                assert np.abs(change).sum() <= norm.l1 and math.sqrt((change**2).sum()) <= norm.l2 * (1 + 1e-12)


@pytest.mark.parametrize(("asked", "target"), ASKED[:5])
def test_base_margins_are_the_best_constants(asked: Any, target: str) -> None:
    objective = make(asked, target, SCHEMA)
    _, labels = drawn(objective, 2000)
    base = objective.base(objective.begin_sums(labels))
    reached = objective.loss_of(np.tile(base, (2000, 1)), labels).mean()

    def loss(by: float, k: int) -> float:
        return float(objective.loss_of(np.tile(base + by * np.eye(len(base))[k], (2000, 1)), labels).mean())

    for k in range(objective.outputs):
        best = minimize_scalar(loss, args=(k,), bracket=(-0.5, 0.5))
        assert reached <= best.fun + (2e-3 * reached if isinstance(asked, dict) else 1e-8 * abs(reached) + 1e-9)


@EVERY
def test_what_noise_or_nobody_makes_of_sums_is_finite(asked: Any, target: str) -> None:
    objective = make(asked, target, SCHEMA)
    for value in (-50.0, 0.0, 3.0):
        sums = {n: np.full(s.shape, value) for n, s in {**objective.begins, **objective.shares}.items()}
        assert np.isfinite(objective.base(sums)).all() and np.isfinite(objective.shared(sums)).all()
        for leaves in (1, 3):
            if declared := objective.renews(leaves):
                assert np.isfinite(
                    objective.renewed({n: np.full(s.shape, value) for n, s in declared.items()}, 5)
                ).all()
        objective.loss({n: np.full(s.shape, value) for n, s in objective.losses.items()})


def test_the_sums_of_all_sites_fit_an_int64() -> None:
    for rows in (1, 1000, 10_000_000, 2**31):
        fixed = Fixed.of(7.3, SCHEMA.model_copy(update={"max_rows": rows}))
        assert fixed.most * rows * 2**14 < 2**62
        assert 2**8 <= fixed.most <= 2**32
        assert math.log2(fixed.unit).is_integer()
    with pytest.raises(PlanError, match="64 bits"):
        Fixed.of(1.0, SCHEMA.model_copy(update={"max_rows": 2**45}))


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_a_renewed_leaf_is_near_the_quantile_of_its_residuals(alpha: float, scale: float) -> None:
    objective = make({"kind": "quantile", "alpha": alpha}, "value", SCHEMA)
    rng = np.random.default_rng(3)
    labels = np.clip(rng.standard_t(3, 6000) * scale + 5, -80, 120)
    margin, leaf = np.full((6000, 1), 4.0), rng.integers(-1, 3, (6000, 1)).astype(np.int32)
    found = objective.renewed(objective.renew_sums(margin, labels, leaf, 4))
    assert found.shape == (1, 4) and found[0, 3] == 0  # nobody is there
    for place in range(3):
        exact = np.quantile(labels[leaf[:, 0] == place] - 4, alpha)
        assert found[0, place] == pytest.approx(exact, rel=0.09, abs=0.06 * scale)


def test_a_renewed_leaf_tells_no_extreme_of_few() -> None:
    objective = make({"kind": "quantile", "alpha": 0.99}, "value", SCHEMA)
    labels = np.array([1.0] * 9 + [100.0])
    sums = objective.renew_sums(np.zeros((10, 1)), labels, np.zeros((10, 1), np.int32), 1)
    assert objective.renewed(sums)[0, 0] > 90
    assert objective.renewed(sums, smallest=5)[0, 0] == pytest.approx(1, rel=0.1)
    assert objective.renewed(sums, smallest=10)[0, 0] == pytest.approx(1, rel=0.1)  # the median
    assert objective.renewed(sums, smallest=11)[0, 0] == 0


def test_the_base_margin_of_an_extreme_quantile_is_nobodys_value() -> None:
    objective = make({"kind": "quantile", "alpha": 0.999}, "value", SCHEMA)
    sums = objective.begin_sums(np.append(np.linspace(1, 20, 99), 110.0))
    assert objective.base(sums)[0] > 90
    assert objective.base(sums, 10)[0] == pytest.approx(20, abs=4)
    assert objective.base(sums, 101)[0] == -80, "the bottom of the range"


def test_cox_s_grid_is_that_of_survival_curves() -> None:
    whole = SCHEMA.with_columns({"days": Column(dtype="integer", range=(0, 400), role="label")})
    assert len(make({"kind": "cox", "event": "binary"}, "days", whole).ends) == 401  # type: ignore[attr-defined]
    asked = {"kind": "cox", "event": "binary", "edges": [10, 50.5]}
    assert make(asked, "days", SCHEMA).ends == (10, 50.5, 400)  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="edges"):
        make({**asked, "edges": [50, 10]}, "days", SCHEMA)


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ("hinge", "value"), ("os", "value"), ({"kind": "squared", "alpha": 1}, "value"), ({}, "value"),
        ("squared", "kind"), ("squared", "absent"), ("logistic", "value"), ("logistic", "share"),
        ("softmax", "value"), ("softmax", "absent"),
        ("poisson", "value"), ({"kind": "quantile", "alpha": 1}, "value"), ({"kind": "cox"}, "days"),
        ({"kind": "cox", "event": "value"}, "days"), ({"kind": "poisson", "max_delta_step": 0}, "count"),
    ],
)  # fmt: skip
def test_an_objective_that_does_not_suit_is_refused(asked: Any, target: str) -> None:
    with pytest.raises(PlanError):
        make(asked, target, SCHEMA)


@EVERY
def test_a_missing_label_is_refused(asked: Any, target: str, federation: Any) -> None:
    column = {**COLUMNS[target], "missing": "allow"}
    made = make(asked, target, SCHEMA)
    first = {"value": 1.0, "count": 1, "binary": 1, "kind": "red", "days": 3.0}[target]
    data = {target: [first, None], **({"binary": [0, 1]} if target == "days" else {})}
    columns = {target: column, **({"binary": COLUMNS["binary"]} if target == "days" else {})}
    with pytest.raises(SchemaError, match="missing"):
        made.labels(federation.table(data, columns))
    data[target] = [first, first]
    assert len(made.labels(federation.table(data, columns))) == 2
