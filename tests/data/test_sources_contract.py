"""The same content through every kind of source gives the same table, bit by bit."""

from __future__ import annotations

import csv
import datetime as dt
import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.sources import SOURCES

COLUMNS: dict[str, dict[str, Any]] = {
    "id": {"dtype": "text", "role": "entity"},
    "x": {"range": [-1e308, 1e308]},
    "n": {"dtype": "integer", "range": [-(2**53), 2**53]},
    "ward": {"dtype": "text", "values": ["北", "south, east"]},
    "note": {"dtype": "text"},
    "day": {"dtype": "date", "role": "time"},
    "at": {"dtype": "datetime"},
}
UTC = dt.UTC
ROWS: list[tuple[Any, ...]] = [
    ("p1", 0.1 + 0.2, 2**53 - 1, "北", "张伟 “quoted” \"q\" 'a'", dt.date(2024, 2, 29), dt.datetime(2024, 1, 1, 8, 30)),
    ("p2", None, None, None, None, None, None),
    ("p3", -1e300, -7, "south, east", "two\nlines", dt.date(1900, 3, 1), dt.datetime(1999, 12, 31, 23, 59, 59)),
    ("p4", 5e-324, 0, "北", "  trimmed\t", dt.date(2000, 1, 1), dt.datetime(2024, 6, 1)),
    ("007", 123456789.125, 1, None, "#1", dt.date(2024, 12, 31), dt.datetime(2024, 1, 1, 0, 0, 1)),
]
Write = Callable[[Path, Any], dict[str, Any]]
WRITERS: dict[str, Write] = {}


def writes(name: str) -> Callable[[Write], Write]:
    def register(writer: Write) -> Write:
        WRITERS[name] = writer
        return writer

    return register


def plain(cell: Any) -> Any:
    return cell.isoformat(" ") if isinstance(cell, dt.datetime) else str(cell) if isinstance(cell, dt.date) else cell


@writes("csv")
def write_csv(folder: Path, _: Any) -> dict[str, Any]:
    with (folder / "t.csv").open("w", newline="", encoding="gb18030") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(["" if cell is None else plain(cell) for cell in row] for row in ROWS)
    return {"path": "t.csv", "encoding": "gb18030"}


@writes("parquet")
def write_parquet(folder: Path, _: Any) -> dict[str, Any]:
    columns = dict(zip(COLUMNS, zip(*ROWS, strict=True), strict=True))
    at = [None if cell is None else cell.replace(tzinfo=UTC) for cell in columns["at"]]
    kinds = {"at": pa.timestamp("ns", "Asia/Shanghai"), "day": pa.date32()}
    table = pa.table({n: pa.array(at if n == "at" else list(c), kinds.get(n)) for n, c in columns.items()})
    pq.write_table(table, folder / "t.parquet")
    return {"path": "t.parquet"}


@writes("excel")
def write_excel(folder: Path, _: Any) -> dict[str, Any]:
    """Excel keeps 15 digits and no year 1900: such cells are written as text, as people do."""
    book = openpyxl.Workbook()
    book.active.append(list(COLUMNS))
    for row in ROWS:
        cells = [repr(cell) if isinstance(cell, float | int) and len(repr(cell)) > 14 else cell for cell in row]
        book.active.append([str(c) if isinstance(c, dt.date) and c.year < 1901 else c for c in cells])
    book.save(folder / "t.xlsx")
    return {"path": "t.xlsx"}


@writes("jsonl")
def write_jsonl(folder: Path, _: Any) -> dict[str, Any]:
    lines = [{n: plain(c) for n, c in zip(COLUMNS, row, strict=True) if c is not None} for row in ROWS]
    (folder / "t.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return {"path": "t.jsonl"}


def create(types: str) -> str:
    declared = [f'"{name}" {kind}' for name, kind in zip(COLUMNS, types.split(), strict=True)]
    return f"CREATE TABLE t ({', '.join(declared)})"


@writes("sqlite")
def write_sqlite(folder: Path, _: Any) -> dict[str, Any]:
    with sqlite3.connect(folder / "t.sqlite") as file:
        file.execute(create("TEXT REAL INTEGER TEXT TEXT TEXT TEXT"))
        file.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)", [[plain(cell) for cell in row] for row in ROWS])
    file.close()
    return {"path": "t.sqlite", "table": "t"}


@writes("duckdb")
def write_duckdb(folder: Path, _: Any) -> dict[str, Any]:
    with duckdb.connect(str(folder / "t.duckdb")) as file:
        file.execute(create("TEXT DOUBLE BIGINT TEXT TEXT DATE TIMESTAMP"))
        file.executemany("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)", [list(row) for row in ROWS])
    return {"path": "t.duckdb", "table": "t"}


@writes("sql")
def write_postgresql(_: Path, postgres: Any) -> dict[str, Any]:
    database = postgres()
    database.execute("DROP TABLE IF EXISTS t")
    database.execute(create("text float8 bigint varchar text date timestamptz"))
    aware = [[c.replace(tzinfo=UTC) if isinstance(c, dt.datetime) else c for c in row] for row in ROWS]
    database.execute("INSERT INTO t VALUES (%s, %s, %s, %s, %s, %s, %s)", aware)
    return {"url": database.url, "table": "t", "password_env": "PG_PASSWORD_OF_TESTS"}


def test_every_tabular_source_has_a_writer() -> None:
    assert set(WRITERS) == set(SOURCES) - {"images"}


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_the_same_content_gives_the_same_table(
    tmp_path: Path, read_table: Any, request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = WRITERS[kind](tmp_path, lambda: request.getfixturevalue("postgres"))
    table = read_table(COLUMNS, **spec)
    wanted: dict[str, np.ndarray] = {}
    for place, (name, column) in enumerate(COLUMNS.items()):
        cells = [row[place] for row in ROWS]
        if column.get("dtype", "real") in ("real", "integer"):
            wanted[name] = np.array([math.nan if cell is None else cell for cell in cells], np.float64)
        elif column["dtype"] == "text":
            wanted[name] = np.array([None if cell is None else cell.strip() for cell in cells], object)
        else:
            wanted[name] = np.array(cells, {"date": "<M8[D]", "datetime": "<M8[us]"}[column["dtype"]])
    assert list(table.columns) == list(wanted)
    for name, column in wanted.items():
        assert table[name].dtype == column.dtype
        if column.dtype == object:
            assert table[name].tolist() == column.tolist()
        else:
            assert table[name].tobytes() == column.tobytes(), name
