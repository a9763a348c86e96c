"""Contribution weights: what FedAvg does where nothing is weighed, and little weight for labels that are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import PlanError
from atoll.contract.program import Cohort, build
from atoll.data.table import Table
from atoll.horizontal.validation import Parts
from atoll.statistics.own_quality import FLOOR, own_quality

COLUMNS: dict[str, Any] = {
    "u": {"range": [-4, 4]},
    "v": {"range": [0, 10]},
    "y": {"dtype": "integer", "values": [0, 1], "role": "label"},
}


def sites(federation: Any, noise: dict[str, float], rows: int = 300, seed: int = 1) -> dict[str, Table]:
    """Labels follow u + v; of site *name* that share is wrong."""
    random, tables = np.random.default_rng(seed), {}
    for name, share in noise.items():
        u, v = random.uniform(-4, 4, rows), random.uniform(0, 10, rows)
        y = (u / 4 + (v - 5) / 5 > 0).astype(float)
        y = np.where(random.random(rows) < share, 1 - y, y)
        tables[name] = federation.table({"u": u, "v": v, "y": y}, COLUMNS, max_rows=10_000)
    return tables


def train(drive: Any, tables: dict[str, Table], program: str = "horizontal.weighted", **more: Any) -> Any:
    params = {"family": "logistic", "features": ["u", "v"], "target": "y", "rounds": 3, "learning_rate": 0.5, **more}
    schema = next(iter(tables.values())).schema
    return drive(build(program, params).coordinate(Cohort(tuple(tables), schema)), tables)


def test_without_exponents_every_site_counts_alike(federation: Any, drive: Any) -> None:
    """FedAvg over the rows that are not held back, written by FedAvg itself."""
    tables = sites(federation, {"a": 0, "b": 0.2})
    kept = {n: t.rows(np.isin(np.arange(len(t)), Parts.of(t, n, 0.3).kept)) for n, t in tables.items()}
    one = train(drive, tables, volume=0, quality=0, accuracy=0, validation=0.3)
    other = train(drive, kept, "horizontal.fedavg", weighting="sites")
    assert np.allclose(one.result["model"].weights, other.result["model"].weights, rtol=0, atol=1e-12)


def test_the_weight_is_the_product_of_its_parts(federation: Any, drive: Any) -> None:
    tables = sites(federation, {"a": 0, "b": 0.3})
    weights = {}
    for power in (0.0, 1.0, 2.0):
        driven = train(drive, tables, rounds=1, volume=0.5, quality=2.0, accuracy=power)
        weights[power] = {site: float(reply["weight"]) for site, reply in driven.replies[0].items()}
    for site, table in tables.items():
        assert weights[0.0][site] == pytest.approx(240**0.5 * own_quality(table) ** 2)
        assert weights[2.0][site] * weights[0.0][site] == pytest.approx(weights[1.0][site] ** 2)
        assert weights[1.0][site] < weights[0.0][site]


def test_sites_with_wrong_labels_count_for_little(federation: Any, drive: Any) -> None:
    tables = sites(federation, {"a": 0, "b": 0, "noisy": 0.5, "worse": 0.6})
    driven = train(drive, tables, rounds=6)
    weights = {site: float(reply["weight"]) for site, reply in driven.replies[-1].items()}
    clean = min(weights["a"], weights["b"])
    assert max(weights["noisy"], weights["worse"]) < 0.1 * clean


def test_sites_with_one_class_alone_are_not_held_to_be_wrong(federation: Any, drive: Any) -> None:
    tables = sites(federation, {"a": 0, "b": 0})
    tables["b"] = tables["b"].rows(tables["b"]["y"] == 1)
    driven = train(drive, tables, rounds=6, volume=0)
    weights = {site: float(reply["weight"]) for site, reply in driven.replies[-1].items()}
    assert weights["b"] > 0.9 * weights["a"]


def test_quality_is_completeness_uniqueness_and_plausibility(federation: Any) -> None:
    number = np.arange(100.0)
    columns = {"x": {"range": [-1e6, 1e6]}}
    whole = federation.table({"x": number}, columns)
    assert own_quality(whole) == 1
    gaps = federation.table({"x": np.where(number < 20, np.nan, number)}, columns)
    twice = federation.table({"x": np.where(number < 20, 50, number)}, columns)
    far = federation.table({"x": np.where(number < 10, 1e5 + number, number)}, columns)
    assert own_quality(gaps) == pytest.approx((0.8 * 0.81) ** (1 / 3))  # and the gaps repeat each other
    assert own_quality(twice) == pytest.approx(0.8 ** (1 / 3))
    assert own_quality(far) == pytest.approx(0.9 ** (1 / 3))
    assert own_quality(whole.rows(number < 0)) == FLOOR


def test_weights_stay_hidden_and_bounded_under_secure_aggregation(federation: Any) -> None:
    tables = sites(federation, {"a": 0, "b": 0.3, "c": 0.5}, rows=60)
    params = {"family": "logistic", "features": ["u", "v"], "target": "y", "rounds": 3}
    plans = [
        federation.plan("horizontal.weighted", params, tables, protection=protection, run={"seed": 2})
        for protection in ("plain", "secagg")
    ]
    plain, hidden = (federation.run(plan, tables)["result"]["model"].weights for plan in plans)
    assert np.allclose(plain, hidden, atol=1e-6)
    assert not any(body["clipped"] for body in federation.releases())


def test_rows_held_back_are_the_same_in_every_round(federation: Any) -> None:
    table = sites(federation, {"a": 0}, rows=50)["a"]
    one, other = Parts.of(table, "a", 0.2), Parts.of(table, "a", 0.2)
    assert np.array_equal(one.held, other.held)
    assert len(one.held) == 10
    assert sorted([*one.held, *one.kept]) == list(range(50))
    assert np.array_equal(one.rows["u"], table["u"][one.held])
    assert not np.array_equal(one.held, Parts.of(table, "b", 0.2).held)
    for number in (0, 1):
        few = Parts.of(table.rows(np.arange(50) < number), "a", 0.2)
        assert (len(few.kept), len(few.held)) == (number, 0)


def test_there_is_one_way_to_say_how_rows_count() -> None:
    params = {"family": "logistic", "features": ["u"], "target": "y", "weighting": "sites"}
    with pytest.raises(PlanError):
        build("horizontal.weighted", params)
