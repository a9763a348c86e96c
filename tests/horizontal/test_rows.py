"""Public rows: within the schema, the same for everybody, and refused where they are not what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table
from atoll.horizontal.rows import PublicParams
from atoll.models.rows import Rows

SCHEMA = TableSchema(
    name="test",
    columns={
        "x": Column(range=(-3, 5)),
        "n": Column(dtype="integer", range=(2, 4)),
        "code": Column(dtype="text", values=("a", "b", "c")),
        "image": Column(dtype="image", shape=(4, 3)),
        "free": Column(dtype="text"),
        "day": Column(dtype="date", role="time"),
        "y": Column(dtype="integer", values=(0, 1), role="label"),
    },
)


def test_generated_rows_fill_the_schemas_ranges_by_their_own_seed() -> None:
    rows = PublicParams(generated=5000).rows(SCHEMA)
    assert len(rows) == 5000
    assert -3 <= rows["x"].min() < -2.9 < 4.9 < rows["x"].max() <= 5
    assert sorted(set(rows["n"])) == [2, 3, 4]
    assert np.bincount(rows.codes("code")).min() > 1500
    assert (rows["image"].shape, rows["image"].dtype) == ((5000, 4, 3), np.uint8)
    assert (rows["image"].min(), rows["image"].max()) == (0, 255)
    again, other = (PublicParams(generated=5000, generated_seed=seed).rows(SCHEMA)["x"] for seed in (0, 1))
    assert np.array_equal(again, rows["x"])
    assert not np.array_equal(other, rows["x"])


@pytest.mark.parametrize("column", ["free", "day"])
def test_what_cannot_be_generated_must_be_given(column: str) -> None:
    with pytest.raises(PlanError) as caught:
        PublicParams(generated=3).rows(SCHEMA)[column]
    assert (caught.value.code, caught.value.field) == ("distil.no-column", column)


def test_given_rows_are_seen_as_a_tables_are() -> None:
    public: dict[str, list[Any]] = {
        "x": [1, 2.5],
        "code": ["c", "a"],
        "free": ["one", "two"],
        "day": ["2024-01-31"] * 2,
    }
    rows = PublicParams(public=public).rows(SCHEMA)
    assert (rows["x"].tolist(), rows["x"].dtype) == ([1, 2.5], np.float64)
    assert rows.codes("code").tolist() == [2, 0]
    assert rows["free"].tolist() == ["one", "two"]
    assert rows["day"].dtype == "datetime64[D]"
    assert rows["y"].tolist() == [0, 0]  # nobody looks at labels that are not given
    assert [batch.tolist() for batch in rows.batches(("x", "y"), 1)] == [[[1, 0]], [[2.5, 0]]]


@pytest.mark.parametrize("public", [{"x": ["far", 1]}, {"image": [[[1]], [[2]]]}, {"day": ["soon", "now"]}])
def test_values_that_are_not_what_the_schema_says_are_refused(public: dict[str, list[Any]]) -> None:
    with pytest.raises(PlanError) as caught:
        PublicParams(public=public).rows(SCHEMA)
    assert (caught.value.code, caught.value.field) == ("plan.bad-public", next(iter(public)))


@pytest.mark.parametrize(
    "params", [{}, {"generated": 3, "public": {"x": [1]}}, {"public": {"x": [1], "n": [1, 2]}}, {"public": {}}]
)
def test_public_rows_are_either_given_or_generated(params: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PublicParams(**params)


def test_a_part_of_a_table_is_its_rows() -> None:
    schema = TableSchema(name="t", columns={n: SCHEMA.columns[n] for n in ("x", "code")})
    table = Table(schema, {"x": np.arange(4.0), "code": np.array(["a", "b", "c", None], object)})
    part = Rows.part(table, np.array([3, 1]))
    assert (len(part), part["x"].tolist(), part.codes("code").tolist()) == (2, [3, 1], [-1, 1])
