"""Steps that leave out rows: each is counted by its reason, whatever the order of the table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.contract.errors import PlanError
from atoll.contract.plan import Recipe
from atoll.data.recipe import Prepared

COLUMNS = {
    "id": {"dtype": "text"}, "day": {"dtype": "date"},
    "x": {"dtype": "integer", "range": [0, 100], "null_values": [-1]},
}  # fmt: skip
HEAD = ["id", "day", "x"]
LATEST = {"step": "deduplicate", "key": ["id"], "latest": "day"}


def test_exact_duplicates(clean: Any) -> None:
    rows = [["b", "2020-01-01", 1], ["a", "", 2], ["b", "2020-01-01", 1], ["a", "", 2], ["a", "", 3]]
    table = clean([{"step": "deduplicate"}], COLUMNS, [HEAD, *rows])
    assert table["id"].tolist() == ["b", "a", "a"]
    assert table["x"].tolist() == [1, 2, 3]
    assert table.dropped == {"duplicate rows": 2}


def test_all_duplicates(clean: Any) -> None:
    table = clean([{"step": "deduplicate"}], COLUMNS, [HEAD, *[["a", "2020-01-01", 1]] * 50])
    assert len(table) == 1
    assert table.dropped == {"duplicate rows": 49}


def test_the_latest_of_a_key(clean: Any) -> None:
    rows = [
        ["a", "2020-03-01", 1], ["b", "", 2], ["a", "2020-12-01", 3], ["b", "2019-01-01", 4], ["", "2020-01-01", 5],
        ["", "2020-01-01", 6], ["a", "2020-12-01", 7], ["a", "", 8], ["b", "", 2],
    ]  # fmt: skip
    table = clean([LATEST], COLUMNS, [HEAD, *rows])
    assert table["x"].tolist() == [4, 5, 6, 7]
    assert table.dropped == {"duplicate rows": 1, "superseded rows": 4}


def test_latest_is_compared_as_what_the_schema_says(clean: Any) -> None:
    rows = [["a", "", 9], ["a", "", 80], ["a", "", 10]]
    assert clean([{**LATEST, "latest": "x"}], COLUMNS, [HEAD, *rows])["x"].tolist() == [80]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=40))
def test_every_row_is_kept_or_counted(clean: Any, cells: list[tuple[str, int, int]]) -> None:
    rows = [[key, f"2020-01-0{day}", x] for key, day, x in cells]
    table = clean([LATEST], COLUMNS, [HEAD, *rows])
    best: dict[str, tuple[int, int]] = {}
    distinct = list(dict.fromkeys(cells))
    for place, (key, day, _) in enumerate(distinct):
        best[key] = max(best.get(key, (0, 0)), (day, place))
    assert table["x"].tolist() == [distinct[place][2] for place in sorted(place for _, place in best.values())]
    assert len(table) + sum(table.dropped.values()) == len(cells)


def test_key_and_latest_go_together(clean: Any) -> None:
    for wrong in ({"key": ["id"]}, {"latest": "day"}):
        with pytest.raises(PlanError):
            clean([{"step": "deduplicate", **wrong}], COLUMNS, [HEAD, ["a", "", 1]])
    with pytest.raises(PlanError) as caught:
        clean([{**LATEST, "key": ["who"]}], COLUMNS, [HEAD, ["a", "", 1]])
    assert caught.value.code == "recipe.no-column"


def test_drop_missing(clean: Any) -> None:
    rows = [["a", "2020-01-01", 1], ["", "2020-01-01", 2], ["c", "", 3], ["d", "2020-01-01", -1], ["", "", 5]]
    table = clean([{"step": "drop_missing", "columns": ["id", "x"]}], COLUMNS, [HEAD, *rows])
    assert table["id"].tolist() == ["a", "c"]
    assert table.dropped == {"without id": 2, "without x": 1}


def test_complete_rows_forbids_what_is_left(prepare: Any, table_of: Any) -> None:
    table = table_of({"id": ["a", None], "day": ["2020-01-01"] * 2, "x": [np.nan, 1]}, COLUMNS)
    made = prepare([{"step": "complete_rows", "columns": ["x", "id"]}], {"one": table})["one"]
    assert len(made) == 0
    assert made.dropped == {"without x": 1, "without id": 1}
    assert made.schema.columns["x"].missing == "forbid"


def test_range_rule(clean: Any) -> None:
    rows = [["a", "", 1], ["b", "", 101], ["c", "", -1], ["d", "", ""], ["e", "", -20], ["f", "", 50]]
    rule = {"step": "range_rule", "columns": "x", "outside": "missing"}
    table = clean([rule], COLUMNS, [HEAD, *rows])
    assert np.array_equal(table["x"], [1, np.nan, np.nan, np.nan, np.nan, 50], equal_nan=True)
    assert table.dropped == {}
    table = clean([{**rule, "outside": "drop", "range": [0, 40]}], COLUMNS, [HEAD, *rows])
    assert table["id"].tolist() == ["a", "c", "d"]
    assert table.dropped == {"x outside its range": 3}


def test_a_range_rule_needs_a_range(clean: Any) -> None:
    rule = {"step": "range_rule", "outside": "missing"}
    with pytest.raises(PlanError) as caught:
        clean([{**rule, "columns": "id"}], COLUMNS, [HEAD, ["a", "", 1]])
    assert caught.value.code == "recipe.no-range"
    with pytest.raises(PlanError):
        clean([{**rule, "columns": "x", "range": [3, 1]}], COLUMNS, [HEAD, ["a", "", 1]])


def test_reasons_are_declared() -> None:
    clean = (
        LATEST,
        {"step": "drop_missing", "columns": ["id"]},
        {"step": "range_rule", "columns": "x", "outside": "drop"},
    )
    assert Prepared(Recipe(clean=clean)).drops() == (
        "duplicate rows", "superseded rows", "without id", "x outside its range",
    )  # fmt: skip
