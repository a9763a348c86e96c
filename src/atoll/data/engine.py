"""The site's own engine: DuckDB through Ibis, with a memory limit and a private folder to spill into.

Everything that is done to whole tables (reading, cleaning, checking, preparing) is an Ibis
expression that runs in here, out of core; arrays come out only at the end. An agency's own
database only delivers the columns and rows that are asked for: two engines do not round, compare
and sort alike, and a recipe must mean the same at every site.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from atoll.contract.errors import AtollError, SchemaError

PART_ROWS = 131_072
"""Rows of Arrow data that are loaded at once: a whole row group of DuckDB's."""
MEMORY_BYTES = 256 << 20
"""What DuckDB may hold in memory; the rest goes to the scratch folder."""


class Engine:
    """One private DuckDB. What it holds is gone when nothing refers to it any more."""

    def __init__(self, scratch: Path | None = None) -> None:
        """scratch: where its own folder (mode 0700) is made; default: the system's temporary folder."""
        if scratch is not None:
            scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="atoll-data-", dir=scratch))
        self.backend: Any = ibis.duckdb.connect(threads=min(2, os.cpu_count() or 1))
        self._connection: Any = self.backend.con
        self._connection.execute(f"SET memory_limit='{MEMORY_BYTES}B'")
        self._connection.execute("SET temp_directory=?", [str(self.folder)])
        self._connection.execute("SET enable_progress_bar = false")  # it would be drawn on standard output
        self._connection.execute("SET GLOBAL TimeZone='UTC'")  # whatever the machine's: times with a zone become UTC
        self._tables = 0
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def keep(self, table: ir.Table, number: str) -> ir.Table:
        """*table* computed once and kept, in its order, with a column *number* counting from 0. Raises SchemaError."""
        name, inside = self._name(), ibis.to_sql(table, dialect="duckdb")
        counted = f'SELECT *, row_number() OVER () - 1 AS "{number}" FROM ({inside})'  # noqa: S608
        with telling():
            self._connection.execute(f'CREATE TABLE "{name}" AS {counted}')
        return self.backend.table(name)

    def load(self, data: pa.Table | pa.RecordBatchReader) -> ir.Table:
        """Arrow data, copied into the engine. Raises SchemaError when its reader fails."""
        name, batches = self._name(), iter(data.to_batches() if isinstance(data, pa.Table) else data)
        statement, more = f'CREATE TABLE "{name}" AS SELECT * FROM loading', True  # noqa: S608

        def part() -> Iterator[pa.RecordBatch]:
            nonlocal more
            rows, more = 0, False
            while rows < PART_ROWS and (batch := next(batches, None)) is not None:
                rows, more = rows + len(batch), True
                yield batch

        with telling():
            while more:  # a statement keeps what it has scanned of Arrow's until it ends, whatever the memory limit
                self._connection.register("loading", pa.RecordBatchReader.from_batches(data.schema, part()))
                try:
                    self._connection.execute(statement)
                finally:
                    self._connection.unregister("loading")
                statement = f'INSERT INTO "{name}" SELECT * FROM loading'  # noqa: S608
        return self.backend.table(name)

    def file(self, path: Path, reader: str) -> ir.Table:
        """A file that DuckDB's function *reader* reads, each time it is looked at. Raises SchemaError."""
        self._tables += 1
        name, quoted = f"file {self._tables}", glob.escape(str(path)).replace("'", "''")
        with telling():
            self._connection.execute(f"CREATE VIEW \"{name}\" AS SELECT * FROM {reader}('{quoted}')")  # noqa: S608
        return self.backend.table(name)

    def beside(self, table: ir.Table, data: pa.Table) -> ir.Table:
        """A kept *table* with the columns of *data* (as many rows, in the same order) added to it."""
        name = self._name()
        self._connection.register("loading", data)
        try:
            inside = ibis.to_sql(table, dialect="duckdb")
            self._connection.execute(
                f'CREATE TABLE "{name}" AS SELECT * FROM ({inside}) AS inside POSITIONAL JOIN loading'  # noqa: S608
            )
        finally:
            self._connection.unregister("loading")
        return self.backend.table(name)

    def forget_all_but(self, table: ir.Table) -> None:
        """Drop every kept table that *table* is not made of."""
        needed = ibis.to_sql(table, dialect="duckdb")
        for name in self.backend.list_tables():
            if name.startswith("kept ") and f'"{name}"' not in needed:
                self._connection.execute(f'DROP TABLE "{name}"')

    def row(self, table: ir.Table) -> dict[str, Any]:
        """The only row of an aggregate. Raises SchemaError."""
        with telling():
            cursor = self._connection.cursor().execute(ibis.to_sql(table, dialect="duckdb"))
            return dict(cursor.to_arrow_table().to_pylist()[0])

    def batches(self, table: ir.Table, size: int = 65_536) -> Iterator[pa.RecordBatch]:
        """The rows of *table* as Arrow batches. Raises SchemaError."""
        with telling():
            cursor = self._connection.cursor().execute(ibis.to_sql(table, dialect="duckdb"))
            yield from cursor.to_arrow_reader(size)

    @contextmanager
    def within(self, seconds: float | None) -> Iterator[None]:
        """Interrupt what runs in here after *seconds*; raises SchemaError then."""
        if seconds is None:
            yield
            return
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._connection.interrupt()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            yield
        except AtollError:
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():  # also where nothing ran in here that could be interrupted
            raise SchemaError(
                "source.timeout", f"reading the table took longer than {seconds:g} s", field="timeout_s",
                remedy="raise the source's timeout_s, or read a smaller table or a faster view",
            )  # fmt: skip

    def _name(self) -> str:
        self._tables += 1
        return f"kept {self._tables}"


@contextmanager
def telling() -> Iterator[None]:
    """Engines' messages quote cells, so none is passed on."""
    try:
        yield
    except AtollError:
        raise
    except (duckdb.OutOfMemoryException, MemoryError):
        raise SchemaError(
            "source.out-of-memory", "the site's engine ran out of memory or of scratch space", field="path",
            remedy="free disk space for the scratch folder, or give the site's process more memory",
        ) from None  # fmt: skip
    except Exception:
        raise SchemaError(
            "source.unreadable",
            "the table could not be read to its end",
            field="path",
            remedy="look for lines with too many or too few cells, and for cells that are not UTF-8",
        ) from None
