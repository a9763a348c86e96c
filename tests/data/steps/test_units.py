"""One unit, whatever a site's table has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError, SchemaError

COLUMNS = {"glucose": {"unit": "mmol/L", "range": [-1e9, 1e9], "null_values": [-9, "x"]}, "k": {"dtype": "text"}}
UNITS = {"step": "units", "column": "glucose", "to": "mmol/L", "from": {"mg/dL": 0.0555, "F": [0.5, -16]}}


def read(clean: Any, cells: list[Any], unit: str = "", **more: Any) -> list[float]:
    units = {"glucose": unit} if unit else {}
    return clean([{**UNITS, **more}], COLUMNS, [["glucose", "k"], *([c, "k"] for c in cells)], units=units)["glucose"]


def test_the_sources_declaration_says_which_factor_applies(clean: Any) -> None:
    assert read(clean, [90], "mg/dL")[0] == 90 * 0.0555
    assert read(clean, [5], "mmol/L")[0] == 5
    assert read(clean, [5])[0] == 5
    assert read(clean, [50], "F")[0] == 9


def test_codes_for_missing_are_not_converted(clean: Any) -> None:
    assert np.isnan(read(clean, ["-9", "-9.0", "x", ""], "mg/dL")).all()


@settings(max_examples=20)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_no_digit_is_lost(clean: Any, numbers: list[float]) -> None:
    numbers = [x for x in numbers if x != -9]
    if numbers:
        assert np.array_equal(read(clean, [repr(x) for x in numbers], "mg/dL"), np.array(numbers) * 0.0555)


def test_what_is_no_number_breaks_the_contract(clean: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        read(clean, ["high", 3], "mg/dL")
    assert caught.value.code == "schema.type"


def test_units_that_the_recipe_does_not_know(clean: Any) -> None:
    with pytest.raises(SchemaError) as caught:
        read(clean, [1], "mg/l")
    assert (caught.value.code, caught.value.field) == ("schema.unit", "glucose")
    with pytest.raises(PlanError) as wrong:
        read(clean, [1], to="g/L")
    assert wrong.value.code == "recipe.wrong-unit"
    for factor in (0, -1, [0, 1]):
        with pytest.raises(PlanError):
            read(clean, [1], **{"from": {"mg/dL": factor}})
