"""SQLite files. Their columns have no types, only their cells do: all come as text."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ibis.expr.types as ir
import pyarrow as pa

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, source
from atoll.data.sources.cells import BATCH_ROWS, as_text
from atoll.data.sources.sql import (
    bad_query,
    check_question,
    database_file,
    interrupting,
    no_table,
    qualified,
    question,
    too_slow,
    unreachable,
)


@database_file("sqlite")
@source("sqlite", ".sqlite", ".sqlite3", ".db")
def open_sqlite(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """One statement reads, so what it sees is consistent. Images are binary."""
    check_question(spec)
    images = {spec.columns.get(n, n) for n, c in (schema.columns if schema else {}).items() if c.dtype == "image"}
    failed: list[Exception] = []
    try:
        place = f"file:{quote(str(path.absolute()))}?mode=ro"
        with closing(sqlite3.connect(place, uri=True, check_same_thread=False)) as connection:
            if not spec.query and not connection.execute(f"PRAGMA table_info({qualified(spec.table)})").fetchall():
                raise no_table()
            with interrupting(spec.timeout_s, connection.interrupt):
                return engine.load(_reader(connection, spec, schema, images, failed))
    except sqlite3.Error as error:
        raise _told(error, spec) from None
    except SchemaError as error:
        raise _told(failed[0], spec) if failed else error from None


def _reader(
    connection: sqlite3.Connection, spec: SourceSpec, schema: TableSchema | None, images: set[str],
    failed: list[Exception],
) -> pa.RecordBatchReader:  # fmt: skip
    names, asked = question(spec, schema, connection.execute)
    kinds = pa.schema([(name, pa.binary() if name in images else pa.string()) for name in names])
    cursor = connection.execute(asked)

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            while rows := cursor.fetchmany(BATCH_ROWS):
                cells = ([_cell(row[i], name in images) for row in rows] for i, name in enumerate(names))
                yield pa.record_batch([pa.array(c, kinds.field(i).type) for i, c in enumerate(cells)], schema=kinds)
        except Exception as error:
            failed.append(error)
            raise

    return pa.RecordBatchReader.from_batches(kinds, batches())


def _cell(value: Any, image: bool) -> Any:
    if isinstance(value, bytes):
        return value if image else value.decode()
    return None if image else as_text(value)


def _told(error: Exception, spec: SourceSpec) -> SchemaError:
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_INTERRUPT:
        return too_slow(spec)
    if isinstance(error, UnicodeError) or "decode to UTF-8" in str(error):
        return SchemaError(
            "source.encoding", "the database holds text that is not UTF-8, or binary cells", field="table",
            remedy="leave the column out by a query, or mend it",
        )  # fmt: skip
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR:
        return bad_query() if spec.query else no_table()
    return unreachable()
