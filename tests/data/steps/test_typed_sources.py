"""Cleaning of cells that already have a type, as from Parquet, a workbook or a database."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.contract.plan import Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.recipe import Prepared
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table

COLUMNS: dict[str, Any] = {
    "id": {"dtype": "text"},
    "sex": {"dtype": "integer", "values": [0, 1]},
    "x": {"range": [0, 100], "null_values": [-9], "unit": "kg"},
    "seen": {"dtype": "datetime"},
    "day": {"dtype": "date"},
}
ROWS = {
    "id": pa.array([12, 7, 12]),
    "sex": pa.array([1, 2, 1]),
    "x": pa.array([1000.0, -9.0, 1000.0]),
    "seen": pa.array([dt.datetime(2020, 1, 1, 8)] * 3, pa.timestamp("us")),
    "day": pa.array([43831.0, 20200102.0, 43831.0]),
}


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Table]:
    def from_parquet(*clean: Any, **spec: Any) -> Table:
        pq.write_table(pa.table(ROWS), tmp_path / "table.parquet")
        source = SourceSpec(path="table.parquet", **spec)
        schema = TableSchema(name="t", columns={n: Column(**c) for n, c in COLUMNS.items()})
        frame = Prepared(Recipe(clean=clean)).cleaned(open_source(source, schema, tmp_path, Engine()))
        return checked(known_columns(frame, source)).to_table()

    return from_parquet


def test_typed_cells_are_cleaned_as_text_is(read: Any) -> None:
    table = read(
        {"step": "deduplicate"},
        {"step": "text", "columns": "id", "pad": 4},
        {"step": "codes", "columns": "sex", "map": {"1": 1, "2": 0}, "other": "error"},
        {"step": "numbers", "columns": "x"},
        {"step": "units", "column": "x", "to": "kg", "from": {"g": 0.001}},
        {"step": "range_rule", "columns": "x", "outside": "drop"},
        {"step": "dates", "columns": "seen", "formats": "%Y", "timezone": "Asia/Shanghai"},
        {"step": "dates", "columns": "day", "formats": ["%Y%m%d", "excel"]},
        {"step": "drop_missing", "columns": ["id"]},
        units={"x": "g"},
    )
    assert table["id"].tolist() == ["0012", "0007"]
    assert table["sex"].tolist() == [1, 0]
    assert np.array_equal(table["x"], [1, np.nan], equal_nan=True)
    assert [str(t) for t in table["seen"]] == ["2020-01-01T00:00:00.000000"] * 2
    assert [str(day) for day in table["day"]] == ["2020-01-01", "2020-01-02"]
    assert table.dropped == {"duplicate rows": 1, "x outside its range": 0, "without id": 0}
