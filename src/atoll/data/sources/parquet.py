"""Parquet: columns keep their types."""

from __future__ import annotations

import glob
from pathlib import Path

import ibis.expr.types as ir

from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine, telling
from atoll.data.sources import SourceSpec, source


@source("parquet", ".parquet", ".pq")
def open_parquet(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """The file's columns, read when they are looked at."""
    with telling():
        table: ir.Table = engine.backend.read_parquet(glob.escape(str(path)))
    return table
