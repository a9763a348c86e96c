"""Parquet: columns keep their types."""

from __future__ import annotations

from pathlib import Path

import ibis
import ibis.expr.types as ir

from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.frame import ROW
from atoll.data.sources import SourceSpec, source


@source("parquet", ".parquet", ".pq")
def open_parquet(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """The file's columns, read when they are looked at."""
    table = engine.file(path, "read_parquet")
    return table.mutate(**{ROW: ibis.row_number()})  # it is cheap to read again, so it is not copied
