"""PostgreSQL: one COPY inside a read-only, repeatable-read transaction, streamed as text.

The server writes the text (C, no Python object a cell), Arrow parses it, the engine keeps it: memory stays
bounded at any number of rows. The rows come in the table's own order, without parallel or synchronised
scans, so that the same table gives the same order twice.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.csv as arrow_csv

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, wanted
from atoll.data.sources.sql import bad_query, database, no_driver, no_table, password, too_slow, unreachable

BLOCK_BYTES = 8 << 20
"""Arrow parses so much at once; a row must fit."""
CONNECT_S = 10
_BOOL, _BYTEA, _TIMESTAMPTZ = 16, 17, 1184  # type numbers (pg_type.oid)
_SETTINGS = {
    "TimeZone": "UTC", "DateStyle": "ISO, YMD", "bytea_output": "hex", "extra_float_digits": "1",
    "synchronize_seqscans": "off", "max_parallel_workers_per_gather": "0", "xmlbinary": "base64",
}  # fmt: skip


@database("postgresql", "postgres")
def open_postgresql(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """Cells as text; truth as 1 and 0, times with a zone in UTC, bytea as binary."""
    try:
        import psycopg
    except ImportError:
        raise no_driver('"atoll[postgres]"') from None
    secret = password(spec)
    stream: _Stream | None = None
    try:
        connection = psycopg.connect(
            "postgresql" + spec.url[spec.url.index("://") :], password=secret, client_encoding="UTF8",
            connect_timeout=CONNECT_S, keepalives_idle=10, keepalives_interval=5, keepalives_count=3,
        )  # fmt: skip
        with closing(connection):
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            limit = {} if spec.timeout_s is None else {"statement_timeout": str(max(1, round(spec.timeout_s * 1000)))}
            for name, value in {**_SETTINGS, **limit}.items():
                connection.execute("SELECT set_config(%s, %s, true)", (name, value))
            names, binary, question = _question(connection, spec, schema)
            with connection.cursor().copy(question) as copy:
                stream = _Stream(copy)
                return engine.load(_reader(stream, names, binary))
    except (psycopg.Error, SchemaError) as error:
        failure = stream.failed if stream is not None and stream.failed is not None else error
        if isinstance(failure, SchemaError):
            raise failure from None
        raise _told(str(getattr(failure, "sqlstate", None) or ""), spec) from None


def _question(connection: Any, spec: SourceSpec, schema: TableSchema | None) -> tuple[list[str], list[str], Any]:
    """(the columns' names, those of binary type, the COPY)."""
    from psycopg import sql

    place = (
        sql.SQL("({}\n) AS source").format(sql.SQL(spec.query.strip().rstrip(";")))
        if spec.query
        else sql.Identifier(*spec.table.split("."))
    )
    there = connection.execute(sql.SQL("SELECT * FROM {} LIMIT 0").format(place)).description
    kinds = {column.name: column.type_code for column in there}
    if len(kinds) < len(there):
        raise bad_query()
    names = wanted(spec, schema, list(kinds))
    forms = {_BOOL: sql.SQL("{}::int"), _TIMESTAMPTZ: sql.SQL("{} AT TIME ZONE 'UTC'")}
    cells = [forms.get(kinds[name], sql.SQL("{}")).format(sql.Identifier(name)) for name in names]
    copy = sql.SQL("COPY (SELECT {} FROM {}) TO STDOUT (FORMAT csv)").format(sql.SQL(", ").join(cells), place)
    return names, [name for name in names if kinds[name] == _BYTEA], copy


def _reader(stream: _Stream, names: list[str], binary: list[str]) -> pa.RecordBatchReader:
    schema = pa.schema([(name, pa.binary() if name in binary else pa.string()) for name in names])

    def batches() -> Iterator[pa.RecordBatch]:
        if not stream.waits():
            return
        parsed = arrow_csv.open_csv(
            stream,
            arrow_csv.ReadOptions(column_names=names, block_size=BLOCK_BYTES, use_threads=False),
            arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )  # fmt: skip
        for batch in parsed:
            columns = [_bytes(batch.column(name)) if name in binary else batch.column(name) for name in names]
            yield pa.record_batch(columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def _bytes(cells: pa.Array) -> pa.Array:
    return pa.array([None if cell is None else bytes.fromhex(cell[2:]) for cell in cells.to_pylist()], pa.binary())


class _Stream(io.RawIOBase):
    """What a COPY sends, as a file; remembers why it broke off."""

    def __init__(self, copy: Any) -> None:
        self._copy, self._left = copy, bytearray()
        self.failed: Exception | None = None

    def readable(self) -> bool:
        return True

    def waits(self) -> bool:
        """Is there anything to read?"""
        self._fill(1)
        return bool(self._left)

    def _fill(self, size: int) -> None:
        try:
            while len(self._left) < size and (row := self._copy.read()):
                self._left += row
        except Exception as error:
            self.failed = error
            raise

    def read(self, size: int | None = -1) -> bytes:
        """*size* bytes (fewer at the end)."""
        size = BLOCK_BYTES if size is None or size < 0 else size
        self._fill(size)
        taken = bytes(self._left[:size])
        del self._left[:size]
        return taken


def _told(state: str, spec: SourceSpec) -> SchemaError:
    """What an SQLSTATE means."""
    if state == "57014":  # query_canceled
        return too_slow(spec)
    if state in ("42P01", "3F000", "42501") and not spec.query:  # undefined_table, no schema, no right
        return no_table()
    if state[:2] in ("42", "22", "25", "3F", "0A", "21"):  # syntax and rights, data, writes, unsupported
        return bad_query()
    return unreachable()
