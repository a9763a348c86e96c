"""What boosting is given: plans and labels that cannot be, and sites with few, odd or no rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import AtollError, DisclosureError, PlanError, SchemaError
from atoll.data.table import Table
from atoll.models.trees import FEATURE
from atoll.runtime.policy import Policy

from .boosted_rows import COLUMNS, SIZES, params_of, pooled, rows, steps, tables_of


def refused(
    drive: Any, params: Mapping[str, Any], tables: Mapping[str, Table], error: type[AtollError], code: str
) -> None:
    with pytest.raises(error) as caught:
        drive(steps(params, tables), tables)
    assert code in (caught.value.code, *(part.code for part in caught.value.parts))
    assert caught.value.remedy or caught.value.parts


def test_what_cannot_be_is_refused_before_data_is_read(federation: Any) -> None:
    apart, _ = tables_of(federation)
    for more, code in (
        ({"features": ["a", "nope"]}, "plan.bad-column"),
        ({"features": ["a", "binary"]}, "plan.bad-column"),
        ({"features": ["a"], "categorical": ["b"]}, "plan.bad-column"),
        ({"monotone": {"kind": 1}}, "plan.bad-column"),
        ({"monotone": {"value": 1}}, "plan.bad-column"),
        ({"edges": {"a": [1, 0]}}, "plan.bad-edges"),
        ({"edges": {"kind": [1, 2]}}, "plan.bad-column"),
        ({"max_cells": 20}, "trees.too-many-cells"),
        ({"objective": "nope"}, "trees.objective"),
        ({"objective": "softmax", "target": "value"}, "plan.bad-target"),
        ({"trees": 2000, "max_depth": 12}, "model.too-large"),
    ):
        with pytest.raises(PlanError) as caught:
            next(steps({**params_of("binary"), **more}, apart))
        assert code in (caught.value.code, *(part.code for part in caught.value.parts)), more
    wide = {**COLUMNS, **{f"c{i}": {"range": [0, 1]} for i in range(300)}}
    many = federation.table({**rows(1, 10), **{f"c{i}": np.zeros(10) for i in range(300)}}, wide)
    large = params_of("class", features=[f"c{i}" for i in range(300)], max_depth=11, max_bins=254, trees=1)
    with pytest.raises(PlanError) as caught:
        next(steps(large, {"s": many}))
    assert caught.value.code == "trees.too-many-cells"


def test_missing_and_constant_labels_are_refused(federation: Any, drive: Any) -> None:
    data = rows(1, 60)
    gap = {**data, "binary": np.where(np.arange(60) == 3, np.nan, data["binary"])}
    good = federation.table(data, COLUMNS)
    refused(drive, params_of("binary"), {"s": good, "t": federation.table(gap, COLUMNS)}, SchemaError, "schema.missing")
    for target, value in (("binary", 0.0), ("value", 3.3), ("count", 7.0), ("count", 0.0)):
        constant = federation.table({**data, target: np.full(60, value)}, COLUMNS)
        objective = {"objective": "poisson"} if target == "count" else {}
        refused(drive, params_of(target, **objective), {"s": constant}, SchemaError, "schema.constant-label")
    alike = federation.table({**data, "class": np.full(60, "q", object)}, COLUMNS)
    refused(drive, params_of("class"), {"s": alike, "t": alike}, SchemaError, "schema.constant-label")


def test_sites_without_rows_with_one_row_or_one_class_take_part(federation: Any, drive: Any) -> None:
    parts = [rows(1, 120), {name: column[:0] for name, column in rows(2, 3).items()}, rows(3, 1), rows(4, 50)]
    parts[3]["binary"] = np.ones(50)
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    whole = {"all": federation.table(pooled(parts), COLUMNS)}
    for params in (params_of("binary"), params_of("binary", splits="random"), params_of("class")):
        one, other = (drive(steps(params, tables), tables).result["model"] for tables in (whole, apart))
        assert one.weights.tobytes() == other.weights.tobytes()


def test_a_feature_may_be_missing_at_a_site_or_everywhere(federation: Any, drive: Any) -> None:
    parts = [rows(seed, n) for seed, n in enumerate(SIZES)]
    for part in parts[:1]:
        part["b"] = np.full(len(part["b"]), np.nan)
    for part in parts:
        part["a"] = np.full(len(part["a"]), np.nan)
    apart = {f"s{i}": federation.table(part, COLUMNS) for i, part in enumerate(parts)}
    whole = {"all": federation.table(pooled(parts), COLUMNS)}
    for binning in ("even", "quantiles"):
        params = params_of("value", binning=binning)
        one, other = (drive(steps(params, tables), tables).result["model"] for tables in (whole, apart))
        assert one.weights.tobytes() == other.weights.tobytes()
        assert not (one.words[:, :, FEATURE] == 0).any(), "what is missing everywhere tells nothing"


def test_nobody_has_rows(federation: Any, drive: Any) -> None:
    empty = {name: column[:0] for name, column in rows(2, 3).items()}
    apart = {"s": federation.table(empty, COLUMNS), "t": federation.table(empty, COLUMNS)}
    found = drive(steps(params_of("binary"), apart), apart).result
    assert (found["model"].words[:, 0, FEATURE] == -1).all()
    assert math.isnan(found["history"][0])


def test_features_that_tell_nothing_leave_the_base(federation: Any, drive: Any) -> None:
    data = {**rows(1, 50), "a": np.full(50, 1.0), "b": np.full(50, np.nan)}
    table = {"s": federation.table(data, COLUMNS)}
    model = drive(steps(params_of("binary", features=["a", "b"]), table), table).result["model"]
    np.testing.assert_allclose(model.predict(table["s"]), data["binary"].mean(), rtol=1e-6)


def test_cells_are_not_told_where_a_sites_own_are_seen(federation: Any) -> None:
    apart, _ = tables_of(federation)
    policy = Policy.sandbox().model_copy(update={"min_group_size": 5})
    policies = dict.fromkeys(apart, policy)
    with pytest.raises(DisclosureError) as caught:
        federation.run(federation.plan("trees.boosted", params_of("binary"), apart), apart, policies)
    assert caught.value.code == "disclosure.cells"
    params = params_of("binary", trees=1, max_depth=1)
    federation.run(federation.plan("trees.boosted", params, apart, protection="secagg"), apart, policies)
