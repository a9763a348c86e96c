"""The data contract: what a schema may say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.schema import Column, TableSchema
from atoll.contract.settings import validate


def schema(**columns: dict[str, Any]) -> TableSchema:
    return validate(TableSchema, {"name": "t", "columns": columns}, "schema")


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ({}, "needs a range"), ({"dtype": "integer"}, "needs a range"), ({"role": "label"}, "needs a range"),
        ({"range": [1, 1]}, "lowest < highest"), ({"range": [2, 1]}, "lowest < highest"),
        ({"dtype": "text", "range": [0, 1]}, "numeric dtype"), ({"dtype": "date", "range": [0, 1]}, "numeric dtype"),
        ({"values": []}, "at least one code"), ({"dtype": "text", "values": []}, "at least one code"),
        ({"dtype": "integer", "values": [0, "one"]}, "must be numbers"), ({"values": ["0"]}, "must be numbers"),
        ({"dtype": "float", "range": [0, 1]}, "dtype"), ({"role": "target", "range": [0, 1]}, "role"),
        ({"missing": "maybe", "range": [0, 1]}, "missing"), ({"range": [0]}, "range"), ({"range": [0, 1, 2]}, "range"),
        ({"range": "0-1"}, "range"), ({"range": [0, float("inf")]}, "finite"), ({"range": [0, float("nan")]}, "finite"),
        ({"range": [0, 1], "unit": 5}, "unit"), ({"range": [0, 1], "null_values": [None]}, "null_values"),
    ],
    ids=str,
)  # fmt: skip
def test_a_column_that_contradicts_itself_is_refused(column: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError) as error:
        schema(x=column)
    assert "columns.x" in str(error.value) and why in str(error.value)


@pytest.mark.parametrize(
    "column",
    [
        {"range": [0, 1]}, {"dtype": "integer", "range": [-5, 5]}, {"values": [0.5, 1]}, {"dtype": "text"},
        {"dtype": "integer", "values": [0, 1]}, {"dtype": "text", "values": ["a"]}, {"dtype": "date"},
        {"role": "ignore"}, {"role": "entity"}, {"role": "time"}, {"dtype": "integer", "role": "entity"},
        {"range": [0, 9], "values": [1, 2]}, {"dtype": "text", "role": "label", "null_values": ["?", 0, 1.5]},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_column_may_say(column: dict[str, Any]) -> None:
    made = schema(x=column)
    assert TableSchema.model_validate(made.model_dump(mode="json")) == made


def test_a_column_without_bounds_cannot_be_a_number_that_leaves() -> None:
    """Bounds of what leaves a site derive from the range: every numeric feature or label has one."""
    made = schema(
        age={"range": [0, 120]}, sex={"dtype": "integer", "values": [1, 0]}, ward={"dtype": "text"},
        id={"role": "entity"}, died={"dtype": "integer", "values": [0, 1], "role": "label"},
        seen={"dtype": "date", "role": "time"}, free={"role": "ignore"},
    )  # fmt: skip
    assert made.numeric_columns() == ("age", "sex", "died")
    assert [made.columns[name].bounds() for name in made.numeric_columns()] == [(0, 120), (0, 1), (0, 1)]
    assert [name for name, column in made.columns.items() if column.numeric] == ["age", "sex", "id", "died", "free"]


@given(st.lists(st.integers(-1000, 1000) | st.floats(-1000, 1000), min_size=1))
def test_bounds_of_a_code_list_are_its_extremes(codes: list[float]) -> None:
    assert Column(values=tuple(codes)).bounds() == (min(codes), max(codes))


def test_the_range_wins_over_the_code_list() -> None:
    assert Column(range=(0, 10), values=(1, 2)).bounds() == (0, 10)


@pytest.mark.parametrize("column", [Column(dtype="text", values=("a",)), Column(role="ignore"), Column(dtype="date")])
def test_other_columns_have_no_bounds(column: Column) -> None:
    with pytest.raises(ValueError, match="no bounds"):
        column.bounds()


def test_columns_keep_their_order_and_the_schema_is_frozen() -> None:
    made = schema(b={"range": [0, 1]}, a={"range": [0, 1]}, c={"range": [0, 1]})
    more = made.with_columns({"d": Column(range=(0, 1)), "a": Column(range=(0, 2))})
    assert list(more.columns) == ["b", "a", "c", "d"] and more.columns["a"].range == (0, 2)
    assert list(made.columns) == ["b", "a", "c"] and made.columns["a"].range == (0, 1)
    with pytest.raises(ValueError, match="frozen"):
        made.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("value", [{"name": "t", "columns": {}}, {"name": "t"}, {"columns": {"a": {"dtype": "text"}}}])
def test_a_schema_needs_a_name_and_columns(value: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        validate(TableSchema, value, "schema")
