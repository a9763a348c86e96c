"""Numbers as people write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, SchemaError

COLUMNS = {"x": {"range": [-1e12, 1e12], "null_values": ["n/a", -9]}, "k": {"dtype": "text"}}


def read(clean: Any, cells: list[str], **options: Any) -> list[float]:
    step = {"step": "numbers", "columns": ["x"], **options}
    found = clean([step], COLUMNS, [["x", "k"], *([cell, "k"] for cell in cells)])["x"]
    return [None if np.isnan(x) else x for x in found.tolist()]


@pytest.mark.parametrize(
    ("cell", "options", "number"),
    [
        ("１２．５", {}, 12.5),
        ("−3", {}, -3),
        ("1,234,567.5", {"thousands": ","}, 1234567.5),
        ("1234.5", {"thousands": ","}, 1234.5),
        ("1.234,5", {"thousands": ".", "decimal": ","}, 1234.5),
        ("0,5", {"decimal": ","}, 0.5),
        ("1 234,5", {"thousands": " ", "decimal": ","}, 1234.5),
        ("1\u00a0234", {"thousands": " "}, 1234),
        ("12%", {"percent": "fraction"}, 0.12),
        ("12,5 %", {"percent": "number", "decimal": ","}, 12.5),
        ("７％", {"percent": "fraction"}, 0.07),
        ("12 mg", {"suffix": ["mg"]}, 12),
        ("12mg", {"suffix": ["g", "mg"]}, 12),
        ("1,200 mg/dL", {"suffix": ["mg/dL"], "thousands": ","}, 1200),
        ("1e3", {}, 1000),
        ("n/a", {"decimal": ","}, None),
        ("-9", {"suffix": ["mg"]}, None),
        ("", {}, None),
    ],
)
def test_what_is_declared_is_read(clean: Any, cell: str, options: dict[str, Any], number: float | None) -> None:
    assert read(clean, [cell, "2"], **options) == [number, 2]


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("7731,5", {"thousands": ","}),
        ("7731.5", {"decimal": ","}),
        ("7731.5", {"decimal": ",", "thousands": "."}),
        ("77%", {}),
        ("7731 mg", {}),
        ("7731 kg", {"suffix": ["mg"]}),
        ("77,31,000", {"thousands": ","}),
        ("7731 5", {}),
        ("7731-", {}),
    ],
)
def test_what_is_not_declared_breaks_the_contract(
    clean: Any, problems: Any, cell: str, options: dict[str, Any]
) -> None:
    with pytest.raises(SchemaError) as caught:
        read(clean, [cell, "1"], **options)
    [problem] = problems(caught.value, "7731", "77%")
    assert (problem.code, problem.field) == ("schema.type", "x")


@settings(max_examples=20)
@given(st.lists(st.floats(-1e11, 1e11), min_size=1))
def test_written_and_read_again(clean: Any, numbers: list[float]) -> None:
    numbers = [round(x, 4) for x in numbers if round(x, 4) != -9]
    german = [f"{x:,.4f}".translate({44: ".", 46: ","}) for x in numbers]
    if numbers:
        assert read(clean, german, thousands=".", decimal=",") == numbers


def test_signs_must_differ(clean: Any) -> None:
    with pytest.raises(PlanError):
        read(clean, ["1"], thousands=",", decimal=",")
    with pytest.raises(PlanError):
        read(clean, ["1"], suffix=[" "])
