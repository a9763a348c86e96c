"""DuckDB files, opened read-only by a connection of their own."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import duckdb
import ibis.expr.types as ir

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import MEMORY_BYTES, Engine
from atoll.data.sources import SourceSpec, source, wanted
from atoll.data.sources.sql import (
    BATCH_ROWS,
    asked,
    bad_query,
    check_question,
    database,
    file_of,
    interrupting,
    no_table,
    too_slow,
    unreachable,
)


@database("duckdb")
def open_url(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """A file named by URL."""
    return open_duckdb(spec, file_of(spec, path), schema, engine)


@source("duckdb", ".duckdb", ".ddb")
def open_duckdb(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """Columns keep their types."""
    check_question(spec)
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{MEMORY_BYTES // 2}B", "threads": 1, "temp_directory": str(engine.folder),
    }  # fmt: skip
    try:
        with (
            closing(duckdb.connect(str(path), read_only=True, config=config)) as connection,
            interrupting(spec.timeout_s, connection.interrupt),
        ):
            there = [column[0] for column in connection.execute(f"SELECT * FROM {asked(spec)} LIMIT 0").description]  # noqa: S608
            columns = ", ".join('"' + name.replace('"', '""') + '"' for name in wanted(spec, schema, there))
            cursor = connection.execute(f"SELECT {columns} FROM {asked(spec)}")  # noqa: S608
            return engine.load(cursor.to_arrow_reader(BATCH_ROWS))
    except duckdb.InterruptException:
        raise too_slow(spec) from None
    except duckdb.CatalogException:
        raise (bad_query() if spec.query else no_table()) from None
    except (duckdb.ParserException, duckdb.BinderException, duckdb.DataError):
        raise bad_query() from None
    except duckdb.Error:
        raise unreachable() from None
    except SchemaError as error:
        raise (bad_query() if spec.query and error.code == "source.unreadable" else error) from None
