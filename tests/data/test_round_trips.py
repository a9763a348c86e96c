"""Tables that were written are read back as they were, from CSV and Parquet."""

from __future__ import annotations

import csv
import datetime as dt
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atoll.contract.errors import SchemaError
from atoll.contract.plan import Plan
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec
from atoll.data.table import Table

from .written import (
    CANARY,
    HEADER,
    read_source,
    same,
    schema_of,
    shows_no_cell,
)

KINDS: dict[str, dict[str, Any]] = {
    "r": {"dtype": "real", "range": [-1.7e308, 1.7e308]},
    "i": {"dtype": "integer", "range": [-(2**53), 2**53]},
    "t": {"dtype": "text"},
    "d": {"dtype": "date"},
}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\x85"), max_size=8)
CELLS = st.fixed_dictionaries(
    {
        "r": st.none() | st.floats(-1.7e308, 1.7e308),
        "i": st.none() | st.integers(-(2**53), 2**53),
        "t": st.none() | TEXT,
        "d": st.none() | st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)),
    }
)


def _trimmed(text: str | None) -> str | None:
    return (text or "").strip(" \t\n\r\v\f") or None


def _expected(cells: list[dict[str, Any]]) -> Table:
    columns = {
        "r": np.array([math.nan if c["r"] is None else c["r"] for c in cells], np.float64),
        "i": np.array([math.nan if c["i"] is None else c["i"] for c in cells], np.float64),
        "t": np.array([_trimmed(c["t"]) for c in cells], object),
        "d": np.array([c["d"] for c in cells], "datetime64[D]"),
    }
    return Table(schema_of(KINDS), columns)


@settings(max_examples=40)
@given(st.lists(CELLS, min_size=1, max_size=12))
@example([{"r": -0.0, "i": 2**53, "t": "a,b", "d": None}, {"r": 5e-324, "i": 0, "t": '"', "d": dt.date(2024, 2, 29)}])
@example([{"r": 0.1 + 0.2, "i": -1, "t": "#", "d": None}, {"r": 1.7e308, "i": None, "t": "'x'", "d": None}])
def test_tables_written_as_csv_and_parquet_are_read_back_exactly(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(KINDS)
        writer.writerows(["" if c[k] is None else repr(c[k]) if k == "r" else c[k] for k in KINDS] for c in cells)
    arrow = pa.table(
        {
            "r": pa.array([c["r"] for c in cells], pa.float64()),
            "i": pa.array([c["i"] for c in cells], pa.int64()),
            "t": pa.array([c["t"] for c in cells], pa.string()),
            "d": pa.array([c["d"] for c in cells], pa.date32()),
        }
    )
    pq.write_table(arrow, tmp_path / "t.parquet")
    wanted = _expected(cells)
    same(read_source(SourceSpec(path="t.csv"), wanted.schema, tmp_path), wanted)
    same(read_source(SourceSpec(path="t.parquet"), wanted.schema, tmp_path), wanted)


def test_parquet_keeps_the_same_contract(tmp_path: Path) -> None:
    columns = {"x": {"range": [0, 9], "null_values": [0]}, "c": {"dtype": "text", "values": ["a"]}}
    good = pa.table({"x": pa.array([1.0, None, 0.0, 4.0]), "c": pa.array(["a", None, "?", " a"])})
    pq.write_table(good, tmp_path / "good.parquet")
    table = read_source(SourceSpec(path="good.parquet", nulls=("?",)), schema_of(columns), tmp_path)
    assert np.array_equal(table["x"], [1, np.nan, np.nan, 4], equal_nan=True)
    assert table["c"].tolist() == ["a", None, None, "a"]
    bad = pa.table({"x": pa.array([1.0, math.inf, 31.977, math.nan]), "c": pa.array(["a", "east31977", "a", "a"])})
    pq.write_table(bad, tmp_path / "bad.parquet")
    with pytest.raises(SchemaError) as caught:
        read_source(SourceSpec(path="bad.parquet"), schema_of(columns), tmp_path)
    assert [(p.code, p.field) for p in caught.value.parts] == [
        ("schema.not-finite", "x"),
        ("schema.range", "x"),
        ("schema.code", "c"),
    ]
    assert "2 of 4 cells are NaN" in str(caught.value)
    shows_no_cell(caught.value)
    (tmp_path / "not.parquet").write_text(f"{HEADER}\n{CANARY}\n")
    with pytest.raises(SchemaError) as caught:
        read_source(SourceSpec(path="not.parquet"), schema_of(columns), tmp_path)
    assert caught.value.code == "source.unreadable"
    shows_no_cell(caught.value)


def test_the_real_hospitals_files(atoll_data: Path) -> None:
    """The four heart-disease files keep the example's contract; read again with the csv module alone."""
    from atoll.contract.plan import Plan

    schema = Plan.load(Path(__file__).parents[2] / "examples/heart/plan.yaml").table
    folder = atoll_data / "heart-disease-uci"
    for name, number in {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}.items():
        spec = SourceSpec(path=f"processed.{name}.data", header=False, nulls=("?",))
        table = read_source(spec, schema, folder)
        with (folder / spec.path).open(newline="") as file:
            lines = list(csv.reader(file))
        assert len(table) == len(lines) == number
        for place, column in enumerate(schema.columns):
            if schema.columns[column].role != "ignore":
                nulls = ("?", *(("0",) if column in ("chol", "trestbps") else ()))
                cells = [line[place] for line in lines]
                wanted = [math.nan if c in nulls else float(c) for c in cells]
                assert np.array_equal(table[column], wanted, equal_nan=True), column


def test_a_recipe_that_leaves_nothing_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\nNA\nNA\n")
    schema = schema_of({"x": {"range": [0, 9]}})
    plan = Plan.from_json(
        {"atoll": 1, "name": "t", "schema": schema.model_dump(mode="json"), "program": "statistics.describe",
         "recipe": {"clean": [{"step": "drop_missing", "columns": ["x"]}]}}
    )  # fmt: skip
    with pytest.raises(SchemaError) as caught:
        SiteData.read(SourceSpec(path="t.csv", nulls=("NA",)), plan, tmp_path, "a")
    assert caught.value.code == "schema.nothing-left"
    assert "all 2 rows" in caught.value.message
