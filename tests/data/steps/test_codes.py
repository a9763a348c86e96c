"""A site's codes in the contract's list."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from atoll.contract.errors import SchemaError

COLUMNS = {"sex": {"dtype": "integer", "values": [0, 1]}, "ward": {"dtype": "text", "values": ["n", "s"]}}
CODES = {"step": "codes", "columns": "sex", "map": {"男": 1, "M": 1, "女": 0, "F": 0.0, "?": None}}


def read(clean: Any, cells: list[str], **more: Any) -> Any:
    return clean([{**CODES, **more}], COLUMNS, [["sex", "ward"], *([cell, "n"] for cell in cells)])["sex"]


def test_listed_codes_are_mapped(clean: Any) -> None:
    found = read(clean, ["男", "M", "女", "F", "?", ""])
    assert np.array_equal(found, [1, 1, 0, 0, np.nan, np.nan], equal_nan=True)


def test_other_codes(clean: Any, problems: Any) -> None:
    assert np.array_equal(read(clean, ["M", "1", "0"]), [1, 1, 0])  # kept, and in the contract's list
    assert np.isnan(read(clean, ["X9731"], other="missing")[0])
    for other in ("keep", "error"):
        with pytest.raises(SchemaError) as caught:
            read(clean, ["M", "X9731", "X9731"], other=other)
        [problem] = problems(caught.value, "9731")
        assert problem.field == "sex"
        assert "2 of 3" in problem.message


def test_text_codes(clean: Any) -> None:
    step = {"step": "codes", "columns": ["ward"], "map": {"1": "n", "North": "n", "2": "s"}, "other": "error"}
    table = clean([step], COLUMNS, [["sex", "ward"], [1, "1"], [0, "North"], [0, "2"], [0, ""]])
    assert table["ward"].tolist() == ["n", "n", "s", None]
