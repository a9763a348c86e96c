"""DuckDB files, opened read-only by a connection of their own."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import duckdb
import ibis.expr.types as ir

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import MEMORY_BYTES, Engine
from atoll.data.sources import SourceSpec, source
from atoll.data.sources.sql import (
    BATCH_ROWS,
    bad_query,
    check_question,
    database_file,
    interrupting,
    no_table,
    question,
    too_slow,
    unreachable,
)


@database_file("duckdb")
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
            _, asked = question(spec, schema, connection.execute)
            return engine.load(connection.execute(asked).to_arrow_reader(BATCH_ROWS))
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
