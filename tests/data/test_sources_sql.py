"""Databases: a real PostgreSQL server, SQLite and DuckDB files, and what only Ibis knows."""

from __future__ import annotations

import datetime as dt
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from atoll.contract.errors import SchemaError
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, open_cells
from atoll.data.sources.sql import through_ibis

ENV = "PG_PASSWORD_OF_TESTS"
CANARY = "7731977.31"
LONG = "12345678901234567890.123456789012"
COLUMNS: dict[str, dict[str, Any]] = {
    "i": {"dtype": "integer", "range": [0, 9]},
    "x": {"range": [-1e30, 1e30]},
    "t": {"dtype": "text"},
    "ok": {"dtype": "integer", "values": [0, 1]},
    "day": {"dtype": "date"},
    "at": {"dtype": "datetime"},
}


@pytest.fixture
def patients(postgres: Any) -> Any:
    postgres.execute("DROP SCHEMA IF EXISTS ward CASCADE")
    postgres.execute("CREATE SCHEMA ward")
    postgres.execute(
        'CREATE TABLE ward."Patients" (i int, x numeric(40, 12), t text, ok boolean, day date, at timestamptz,'
        " secret text, who uuid, image bytea, small real)"
    )
    insert = 'INSERT INTO ward."Patients" VALUES (%s, %s, %s, %s, %s, %s, %s, gen_random_uuid(), %s, 0.1)'
    postgres.execute(
        insert,
        [
            (1, "0.30", '中文, "q"\n\'', True, "2024-02-29", "2024-01-01 08:00:00.25+08", CANARY, b"\0\1\2\xff"),
            (None, None, None, None, None, None, CANARY, None),
            (
                2,
                "12345678901234567890.123456789012",
                "",
                False,
                "1999-12-31",
                "2024-06-30 23:59:59-01",
                CANARY,
                b"\3" * 4,
            ),
        ],
    )
    return postgres


def test_postgresql_types_and_projection(patients: Any, read_table: Any) -> None:
    table = read_table(COLUMNS, url=patients.url, table="ward.Patients", password_env=ENV)
    assert list(table.columns) == list(COLUMNS)
    assert np.array_equal(table["i"], [1, np.nan, 2], equal_nan=True)
    assert np.array_equal(table["x"], [0.3, np.nan, float(LONG)], equal_nan=True)
    assert table["t"].tolist() == ['中文, "q"\n\'', None, None]
    assert np.array_equal(table["ok"], [1, np.nan, 0], equal_nan=True)
    assert table["day"].tolist() == [dt.date(2024, 2, 29), None, dt.date(1999, 12, 31)]
    assert table["at"].tolist() == [dt.datetime(2024, 1, 1, 0, 0, 0, 250000), None, dt.datetime(2024, 7, 1, 0, 59, 59)]


def test_only_the_contracts_columns_are_fetched(patients: Any, tmp_path: Path) -> None:
    from atoll.contract.schema import Column, TableSchema

    schema = TableSchema(name="t", columns={"age": Column(dtype="integer", range=(0, 9)), "who": Column(dtype="text")})
    spec = SourceSpec(url=patients.url, table="ward.Patients", password_env=ENV, columns={"age": "i"})
    assert set(open_cells(spec, schema, tmp_path, Engine(tmp_path)).columns) == {"age", "who", "__row"}


def test_postgresql_images_and_queries(patients: Any, read_table: Any) -> None:
    columns = {
        "image": {"dtype": "image", "shape": [2, 2]},
        "n": {"dtype": "integer", "values": [1]},
        "who": {"dtype": "text"},
    }
    query = (
        'SELECT image, count(*) AS n, who, 1 AS more FROM ward."Patients" WHERE image IS NOT NULL'
        " GROUP BY 1, 3 ORDER BY 1;"
    )
    table = read_table(columns, url=patients.url, query=query, password_env=ENV)
    assert table["image"].tolist() == [[[0, 1], [2, 255]], [[3, 3], [3, 3]]]
    assert len(table["who"][0]) == 36


def test_postgresql_refusals(patients: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def code(**spec: Any) -> str:
        error = refused(COLUMNS, **{"url": patients.url, "password_env": ENV, **spec})
        assert patients.password not in str(error)
        return str(error.code)

    assert code(table="ward.nobody") == code(table="nowhere.Patients") == "source.no-table"
    assert code() == code(table="t", query="SELECT 1") == "source.no-table"
    assert code(query=f"SELECT '{CANARY}x'::int AS i") == "source.query"
    assert code(query=f'SELECT "{CANARY}"') == "source.query"
    assert code(query='DELETE FROM ward."Patients" RETURNING *') == "source.query"
    assert code(query='WITH gone AS (DELETE FROM ward."Patients" RETURNING *) SELECT * FROM gone') == "source.query"
    assert code(query="SELECT pg_sleep(600)::text AS t", timeout_s=0.2) == "source.timeout"
    monkeypatch.setenv("WRONG", CANARY)
    assert code(table="ward.Patients", password_env="WRONG") == "source.database"
    assert code(table="ward.Patients", password_env="NOT_SET") == "source.no-password"
    secret = patients.url.replace("@", f":{CANARY}@")
    assert code(url=secret, table="t") == code(url=f"{patients.url}?password={CANARY}", table="t")
    assert code(url=secret, table="t") == "source.password-in-url"
    assert code(url="postgresql://atoll@127.0.0.1:1/none", table="t") == "source.database"
    with patients.connect() as connection:
        assert connection.execute('SELECT count(*) FROM ward."Patients"').fetchone() == (3,)


def test_a_database_that_goes_away_while_it_is_read(patients: Any, refused: Any) -> None:
    """Its backend is ended as soon as it has sent some rows."""
    query = f"SELECT i, '{CANARY}' AS t, pg_sleep(0.001) FROM generate_series(1, 10000000) AS i"
    ended = threading.Event()

    def end() -> None:
        with patients.connect() as connection:
            ask = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE 'COPY%%generate_series%%' AND pid <> pg_backend_pid()"
            )
            while not connection.execute(ask).fetchall():
                pass
        ended.set()

    thread = threading.Thread(target=end)
    thread.start()
    error = refused(COLUMNS, url=patients.url, query=query, password_env=ENV)
    thread.join()
    assert ended.is_set()
    assert error.code == "source.database"


def test_a_table_of_one_column_keeps_its_empty_rows(patients: Any, read_table: Any) -> None:
    query = "SELECT CASE WHEN i % 2 = 0 THEN i END AS i FROM generate_series(1, 4) AS i"
    table = read_table({"i": COLUMNS["i"]}, url=patients.url, query=query, password_env=ENV)
    assert np.array_equal(table["i"], [np.nan, 2, np.nan, 4], equal_nan=True)


def test_no_rows(patients: Any, refused: Any) -> None:
    spec = {"url": patients.url, "password_env": ENV, "query": 'SELECT * FROM ward."Patients" WHERE false'}
    assert refused(COLUMNS, **spec).code == "source.empty"


READS = """
import sys
from pathlib import Path
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, open_cells

engine = Engine()
cells = open_cells(SourceSpec(url=sys.argv[1], query=sys.argv[2], password_env=sys.argv[3]), None, Path(), engine)
found = engine.row(cells.aggregate(n=cells.count(), last=cells["x8"].cast("float64").max()))
# not ru_maxrss: that of a process that was forked begins with its parent's
print(found["n"], found["last"], Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_millions_of_rows_stream_in_bounded_memory(postgres: Any) -> None:
    """Ten columns of four million rows are over 700 MB as text; the process that reads them keeps under 1 GB."""
    columns = ", ".join(f"(i * {n + 1}.5)::float8 / 3 AS x{n}" for n in range(9))
    query = f"SELECT i, {columns} FROM generate_series(1, 4000000) AS i"
    command = [sys.executable, "-c", READS, postgres.url, query, ENV]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, last, held_kib = done.stdout.split()
    assert (int(rows), float(last)) == (4_000_000, 4_000_000 * 9.5 / 3)
    assert int(held_kib) < 1 << 20


# ---------------------------------------------------------------- files


def sqlite_file(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE t (i, x, t, ok, day, at, more)")
        file.executemany(
            "INSERT INTO t VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (1, 0.1 + 0.2, "中文", 1, "2024-02-29", "2024-01-01 00:00:00.25", 1),
                (None,) * 7,
                ("2", 5e-324, "", "0", None, None, 1),
            ],
        )
    file.close()


def duckdb_file(path: Path) -> None:
    with duckdb.connect(str(path)) as file:
        file.execute('CREATE TABLE t (i int, x double, t text, ok boolean, day date, "at" timestamptz, more int)')
        file.execute(
            "INSERT INTO t VALUES (1, 0.30000000000000004, '中文', true, '2024-02-29', '2024-01-01 01:00:00.25+01', 1),"
            " (NULL, NULL, NULL, NULL, NULL, NULL, NULL), (2, 5e-324, '', false, NULL, NULL, 1)"
        )


FILES: list[tuple[str, Callable[[Path], None]]] = [("sqlite", sqlite_file), ("duckdb", duckdb_file)]


@pytest.mark.parametrize(("kind", "write"), FILES, ids=["sqlite", "duckdb"])
def test_database_files(
    tmp_path: Path, read_table: Any, refused: Any, kind: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / f"a b.{kind}")
    for place in (
        {"path": f"a b.{kind}"},
        {"url": f"{kind}:///a%20b.{kind}"},
        {"url": f"{kind}:///{tmp_path}/a%20b.{kind}"},
    ):
        for question in ({"table": "t"}, {"query": "SELECT * FROM t"}):
            table = read_table(COLUMNS, **place, **question)
            assert np.array_equal(table["x"], [0.1 + 0.2, np.nan, 5e-324], equal_nan=True)
            assert table["t"].tolist() == ["中文", None, None]
            assert np.array_equal(table["ok"], [1, np.nan, 0], equal_nan=True)
            assert table["at"].tolist() == [dt.datetime(2024, 1, 1, 0, 0, 0, 250000), None, None]
    assert refused(COLUMNS, **place, table="nobody").code == "source.no-table"
    assert refused(COLUMNS, **place, query=f"SELECT '{CANARY}' FROM nobody").code == "source.query"
    assert refused(COLUMNS, **place, query=f"DROP TABLE '{CANARY}'").code == "source.query"
    assert refused(COLUMNS, path=f"a b.{kind}").code == "source.no-table"
    assert refused(COLUMNS, url=f"{kind}:///none.{kind}", table="t").code == "source.missing-file"
    (tmp_path / f"bad.{kind}").write_text(CANARY * 1000)
    assert refused(COLUMNS, path=f"bad.{kind}", table="t").code == "source.database"
    counting = "WITH RECURSIVE c(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM c) SELECT count(*) AS i FROM c"
    assert refused(COLUMNS, **place, query=counting, timeout_s=0.2).code == "source.timeout"


def test_sqlite_cells_that_are_no_text(tmp_path: Path, refused: Any) -> None:
    with sqlite3.connect(tmp_path / "t.sqlite") as file:
        file.execute("CREATE TABLE t (t)")
        file.execute("INSERT INTO t VALUES (CAST(x'ff80' AS TEXT))")
    file.close()
    assert refused({"t": {"dtype": "text"}}, path="t.sqlite", table="t").code == "source.encoding"


def test_what_only_ibis_knows(tmp_path: Path, refused: Any) -> None:
    """The road by Ibis, on a backend that is installed."""
    with sqlite3.connect(tmp_path / "t.sqlite") as file:
        file.execute("CREATE TABLE t (t TEXT, ok INTEGER)")
        file.executemany("INSERT INTO t VALUES (?, ?)", [("中文", 1), (None, None), ("x", 0)])
    file.close()
    engine = Engine(tmp_path)
    spec = SourceSpec(url=f"sqlite://{tmp_path}/t.sqlite", query="SELECT t, ok FROM t")
    table = through_ibis(spec, tmp_path, None, engine)
    assert engine.row(table.aggregate(n=table.count()))["n"] == 3
    with pytest.raises(SchemaError) as caught:
        through_ibis(spec.model_copy(update={"query": "", "table": "nobody"}), tmp_path, None, engine)
    assert caught.value.code == "source.no-table"
    error = refused(COLUMNS, url="mysql://u@h/d", table="t")
    assert (error.code, error.remedy) == ("source.driver", 'pip install "ibis-framework[mysql]"')
    assert refused(COLUMNS, url="klingon://h", table="t").code == "source.unknown-database"
