"""Delimited text: CSV, TSV and the like, perhaps gzipped."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import ibis.expr.types as ir

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine, telling
from atoll.data.sources import SourceSpec, source


@source("csv", ".csv", ".tsv", ".txt", ".data")
def open_csv(spec: SourceSpec, path: Path, schema: TableSchema, engine: Engine) -> ir.Table:
    """All cells as text. The whole dialect is given: an engine that guesses may take a row for a comment or a title."""
    if path.stat().st_size == 0:
        raise SchemaError("source.empty", "the file is empty", field="path", remedy="check the site's source")
    options: dict[str, Any] = {} if spec.header else {"names": list(schema.columns)}
    with telling():
        table: ir.Table = engine.backend.read_csv(
            glob.escape(str(path)),
            all_varchar=True,
            header=spec.header,
            sep=spec.separator,
            quote='"',
            escape='"',
            comment="",
            skip=0,
            nullstr="",
            **options,
        )
    return table
