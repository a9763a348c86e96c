"""Columns under the contract's names."""

from __future__ import annotations

from typing import Any

import pytest

from atoll.contract.errors import PlanError, SchemaError

COLUMNS = {"age": {"range": [0, 120]}, "sex": {"dtype": "integer", "values": [0, 1]}}
RENAME = {"step": "rename", "columns": {"age": ["AGE", "age (years)", "年龄"]}}


@pytest.mark.parametrize("name", ["age", "AGE", "age (years)", "年龄"])
def test_any_alias_becomes_the_contracts_name(clean: Any, name: str) -> None:
    table = clean([RENAME], COLUMNS, [["sex", name], [1, 30]])
    assert table["age"].tolist() == [30]
    assert table["sex"].tolist() == [1]


def test_one_alias_may_be_written_without_a_list(clean: Any) -> None:
    assert clean([{"step": "rename", "columns": {"age": "y"}}], COLUMNS, [["y", "sex"], [3, 0]])["age"].tolist() == [3]


def test_loose_names_need_not_be_listed(clean: Any) -> None:
    loose = {"step": "rename", "match": "loose", "columns": {"age": ["Age-Years"]}}
    for names in (["AGE YEARS", " Sex"], ["age_years", "ＳＥＸ"], ["Age", "s e x"]):
        assert clean([loose], COLUMNS, [names, [30, 1]])["age"].tolist() == [30]


def test_two_columns_of_one_name_are_refused(clean: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        clean([RENAME], COLUMNS, [["AGE", "年龄", "sex"], [30, 30, 1]])
    assert (caught.value.code, caught.value.field) == ("schema.two-names", "age")


def test_no_alias_found_is_left_to_the_contract(clean: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        clean([RENAME], COLUMNS, [["years", "sex"], [30, 1]])
    assert {part.code for part in caught.value.parts} == {"schema.missing-column", "schema.extra-column"}


@pytest.mark.parametrize("columns", [{"age": ["x"], "sex": ["x"]}, {"age": ["x", "x"]}])
def test_an_alias_listed_twice_is_refused(clean: Any, columns: Any) -> None:
    with pytest.raises(PlanError):
        clean([{"step": "rename", "columns": columns}], COLUMNS, [["x", "sex"], [1, 1]])


def test_the_sites_units_stay_known(clean: Any) -> None:
    units = {"step": "units", "column": "age", "to": "year", "from": {"month": 1 / 12}}
    table = clean([RENAME, units], COLUMNS, [["AGE", "sex"], [24, 1]], units={"age": "month"})
    assert table["age"].tolist() == [2]
