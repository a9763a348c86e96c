"""The cells of a site's table: every way to break the contract has its code, and none shows a cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .written import (
    CANARY,
    DIGITS,
    HEADER,
    ROW,
    read,
    refused,
    rows,
    same,
    schema_of,
)

BROKEN = [
    ("weight", CANARY + "x", "schema.type", "not numbers"),
    ("weight", "7731977,31", "schema.type", "not numbers"),
    ("weight", "NaN", "schema.not-finite", "NaN or infinite"),
    ("weight", "-inf", "schema.not-finite", "NaN or infinite"),
    ("weight", "Infinity", "schema.not-finite", "NaN or infinite"),
    ("weight", "77319.77", "schema.range", "[20, 300] kg"),
    ("weight", "70500", "schema.range", "[20, 300] kg"),
    ("weight", "-70.5", "schema.range", "[20, 300] kg"),
    ("visits", "31.977", "schema.type", "not whole numbers"),
    ("visits", "many31977", "schema.type", "not whole numbers"),
    ("visits", "", "schema.missing", "missing"),
    ("visits", "   ", "schema.missing", "missing"),
    ("sex", "2", "schema.code", "code list"),
    ("sex", "female31977", "schema.type", "not whole numbers"),
    ("ward", "east31977", "schema.code", "code list"),
    ("ward", "North", "schema.code", "code list"),
    ("day", "31.12.1977", "schema.type", "dates"),
    ("day", "2023-02-29", "schema.type", "dates"),
    ("id", "", "schema.missing", "missing"),
    ("id", "p3", "schema.duplicate-id", "repeat"),
]


@pytest.mark.parametrize(("column", "cell", "code", "text"), BROKEN, ids=[f"{c}={v!r}" for c, v, _, _ in BROKEN])
def test_a_broken_cell(tmp_path: Path, column: str, cell: str, code: str, text: str) -> None:
    content = rows({}, {column: f'"{cell}"'}, {}, {}, {})
    error = refused(tmp_path, content)
    assert (error.code, error.field) == (code, column)
    assert f"column {column!r}: 1 " in str(error)
    assert text in str(error)
    assert error.remedy
    if code != "schema.duplicate-id":
        assert "1 of 5 cells" in str(error)


def test_broken_cells_are_counted(tmp_path: Path) -> None:
    content = rows(*[{"weight": CANARY if i % 3 else "70"} for i in range(10)])
    assert "column 'weight': 6 of 10 cells" in str(refused(tmp_path, content))


def test_several_problems_are_all_listed(tmp_path: Path) -> None:
    content = rows(
        {"weight": CANARY, "visits": "3.5"},
        {"weight": CANARY + "x", "ward": f"east{DIGITS}"},
        {"visits": "", "sex": "7"},
        {"day": DIGITS, "id": "p1"},
    )
    error = refused(tmp_path, content)
    assert error.code == "schema.broken"
    assert [(part.code, part.field) for part in error.parts] == [
        ("schema.duplicate-id", "id"),
        ("schema.type", "weight"),
        ("schema.range", "weight"),
        ("schema.type", "visits"),
        ("schema.missing", "visits"),
        ("schema.code", "sex"),
        ("schema.code", "ward"),
        ("schema.type", "day"),
    ]
    assert str(error).startswith("8 problems")


def test_too_many_rows(tmp_path: Path) -> None:
    content = rows(*[{} for _ in range(6)])
    error = refused(tmp_path, content, schema_of(max_rows=5))
    assert (error.code, error.field) == ("schema.too-many-rows", "max_rows")
    assert len(read(tmp_path, content, schema_of(max_rows=6))) == 6


def test_limits_are_inclusive(tmp_path: Path) -> None:
    table = read(tmp_path, rows({"weight": "20"}, {"weight": "300"}, {"weight": "20.0"}))
    assert table["weight"].tolist() == [20, 300, 20]


def test_null_values_and_nulls(tmp_path: Path) -> None:
    columns = {
        "a": {"range": [1, 99], "null_values": [0, -9]},
        "b": {"range": [1, 99], "null_values": ["unknown"]},
        "c": {"dtype": "text", "null_values": [9, "NA"]},
        "d": {"dtype": "integer", "range": [0, 9]},
    }
    content = "a,b,c,d\n0,unknown,9,0\n0.00,3,NA,?\n-9.0,4,x,?\n5, ? ,y,9\n"
    table = read(tmp_path, content, schema_of(columns), nulls=("?",))
    assert np.array_equal(table["a"], [np.nan, np.nan, np.nan, 5], equal_nan=True)
    assert np.array_equal(table["b"], [np.nan, 3, 4, np.nan], equal_nan=True)
    assert table["c"].tolist() == [None, None, "x", "y"]
    assert np.array_equal(table["d"], [0, np.nan, np.nan, 9], equal_nan=True)
    assert refused(tmp_path, content, schema_of(columns)).code == "schema.broken"  # "?" is text without nulls


def test_whitespace_around_cells_does_not_matter(tmp_path: Path) -> None:
    table = read(tmp_path, f"{HEADER}\n p1 ,  70.5\t,3 , 1,\tnorth  , 2024-02-29 ,x\n")
    same(table, read(tmp_path, f"{HEADER}\n{ROW}\n"))


def test_the_dialect_is_not_guessed(tmp_path: Path) -> None:
    """Rows that start with '#' are rows, and apostrophes belong to their cells."""
    schema = schema_of({"t": {"dtype": "text"}, "x": {"range": [0, 9]}})
    table = read(tmp_path, 't,x\n#1,1\n\'a\',2\n"b,""c""\nd",3\n\\,4\n', schema)
    assert table["t"].tolist() == ["#1", "'a'", 'b,"c"\nd', "\\"]
    assert table["x"].tolist() == [1, 2, 3, 4]


def test_rows_keep_the_files_order(tmp_path: Path) -> None:
    """The split into training and held-out rows depends on it."""
    n = 200_000
    schema = schema_of({"i": {"dtype": "integer", "range": [0, n]}})
    table = read(tmp_path, "i\n" + "\n".join(map(str, range(n))), schema)
    assert np.array_equal(table["i"], np.arange(n))
