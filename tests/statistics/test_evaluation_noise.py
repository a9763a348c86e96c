"""Evaluation under noise: one histogram gives every metric, and no noise breaks it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.program import Cohort, build, handler_of
from atoll.contract.rounds import Gather, Round, Summed
from atoll.data.table import Table
from atoll.models.linear import LinearModel
from atoll.privacy.fixed_point import width_of
from atoll.statistics.score_histogram import from_cells

from .evaluated import BINARY, COUNT, REAL, binary_sites, evaluate, model_of


def noisy(drive: Any, model: LinearModel, holdouts: dict[str, Table], noise: Any) -> tuple[dict[str, Any], list[Round]]:
    """What evaluation makes of sums with *noise* (field, array → array) in them, and the rounds it asked."""
    schema = next(iter(holdouts.values())).schema
    inner = build("statistics.evaluation", {"model": model.spec()}).coordinate(
        Cohort(tuple(holdouts), schema, exact=False), {"weights": model.weights}
    )
    training = {name: table.rows(np.zeros(len(table), bool)) for name, table in holdouts.items()}

    def steps() -> Any:
        value = None
        while True:
            try:
                asked = inner.send(value)
            except StopIteration as stop:
                return stop.value
            total = yield asked
            value = Summed({name: noise(name, array) for name, array in total.items()}, total.sites)

    driven = drive(steps(), training, holdouts)
    return driven.result, driven.rounds


def test_under_noise_one_histogram_gives_every_metric(federation: Any, drive: Any) -> None:
    """Without any noise, they are near the exact ones."""
    holdouts = binary_sites(federation, 4, [300, 900, 600], ties=False)
    model = model_of("logistic", holdouts["s0"], [0.2, 6])
    exact = evaluate(drive, model, holdouts)["pooled"]
    found, rounds = noisy(drive, model, holdouts, lambda name, array: array)
    assert [(asked.name, set(asked.reply)) for asked in rounds] == [("cells", {"cells"})]
    assert not any(isinstance(asked.reduce, Gather) for asked in rounds)
    assert found["own"] == {}
    near = {"accuracy": 1e-12, "f1": 1e-12, "auc": 2e-3, "ks": 0.02, "log_loss": 0.01, "brier": 0.01}
    for name, distance in near.items():
        assert abs(found["pooled"][name] - exact[name]) <= distance, name


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 3.0, 1000.0]), st.sampled_from(["logistic", "linear"]))
def test_no_noise_breaks_it(federation: Any, drive: Any, seed: int, scale: float, family: str) -> None:
    random = np.random.default_rng(seed)
    holdouts = binary_sites(federation, 4, [0, 20, 5], ties=False)
    if family == "linear":
        holdouts = {n: federation.table({"x": t["x"], "y": 9 * t["y"]}, REAL) for n, t in holdouts.items()}

    def noise(name: str, array: Any) -> Any:
        return (array + np.rint(random.normal(0, scale, np.shape(array)))).astype(array.dtype)

    found, _ = noisy(drive, model_of(family, holdouts["s1"], [0.2, 6]), holdouts, noise)
    for name, value in found["pooled"].items():
        assert math.isnan(value) or math.isfinite(value)
        if name in ("auc", "ks", "accuracy", "f1", "brier"):
            assert math.isnan(value) or 0 <= value <= 1, name
        if name in ("mae", "rmse"):
            assert math.isnan(value) or value >= 0


def test_an_empty_histogram_has_no_metrics() -> None:
    nothing = from_cells(np.full((2, 64), -3))
    assert all(np.all(value == 0) for value in nothing.values())


@pytest.mark.parametrize("family", ["logistic", "linear", "poisson"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_record_changes_no_more_than_is_declared(federation: Any, drive: Any, family: str, exact: bool) -> None:
    """One row more, at the worst places: every field moves within its norms."""
    columns = {"logistic": BINARY, "linear": REAL, "poisson": COUNT}[family]
    random = np.random.default_rng(1)
    x = random.uniform(-10, 10, 30)
    y = {"logistic": (x > 0) * 1.0, "linear": 4.0 * x, "poisson": np.round(np.abs(x))}[family]
    table = federation.table({"x": x, "y": y}, columns)
    low, high = table.schema.columns["y"].bounds()
    for weights in ([0, 0], [0, 1e4], [50, -1e3]):
        model = model_of(family, table, weights)
        program = build("statistics.evaluation", {"model": model.spec(), "own": False})
        asked: Any = next(program.coordinate(Cohort(("a",), table.schema, exact=exact), {"weights": model.weights}))
        declared = handler_of(program, asked.name).record
        norms = declared(program, table.schema, {k: np.asarray(v) for k, v in asked.send.items()})  # type: ignore[misc]
        assert set(norms) == set(asked.reply)
        before = _reply(drive, asked, table)
        for extra_x, extra_y in [(-10, low), (10, low), (-10, high), (10, high), (0.0, high)]:
            more = federation.table({"x": np.append(x, extra_x), "y": np.append(y, extra_y)}, columns)
            after = _reply(drive, asked, more)
            for name, norm in norms.items():
                moved = np.abs(np.asarray(after[name], float) - before[name])
                assert moved.sum() <= norm.l1 * (1 + 1e-9), name
                assert np.linalg.norm(moved) <= norm.l2 * (1 + 1e-9), name


def _reply(drive: Any, asked: Round, table: Table) -> dict[str, Any]:
    def steps() -> Any:
        total = yield asked
        return dict(total)

    return drive(steps(), {"a": table.rows(np.zeros(len(table), bool))}, {"a": table}).result  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["logistic", "linear", "poisson"])
@pytest.mark.parametrize("exact", [True, False])
def test_sums_of_many_large_sites_fit_a_ring(federation: Any, family: str, exact: bool) -> None:
    table = federation.table({"x": [1.0], "y": [1.0]}, {"logistic": BINARY, "linear": REAL, "poisson": COUNT}[family])
    assert table.schema.max_rows == 10**7
    model = model_of(family, table, [0, 1])
    program = build("statistics.evaluation", {"model": model.spec()})
    asked: Any = next(program.coordinate(Cohort(("a",), table.schema, exact=exact), {"weights": model.weights}))
    assert all(width_of(name, field, 256) <= (128 if exact else 64) for name, field in asked.reply.items())
