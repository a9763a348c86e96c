"""Reading a site's table through Ibis (DuckDB) and checking it against the data contract.

Cells are read as text, so that one malformed cell is a counted problem of one column
and not a failure of the whole read, and engine errors, which quote cells, never
surface. All checks are one aggregate query inside the engine; only then do the columns
leave it as arrays.
"""

from __future__ import annotations

import difflib
import glob
import os
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from atoll.contract.errors import AtollError, SchemaError, refuse_all
from atoll.contract.schema import Column, TableSchema
from atoll.data.table import Table

_IBIS_TYPE = {"real": "float64", "integer": "float64", "text": "string", "date": "date"}
_WHAT = {"real": "numbers", "integer": "whole numbers", "text": "text", "date": "dates (YYYY-MM-DD)"}


class SourceSpec(BaseModel):
    """Where a site's table is. One entry of SITES.yaml or of a site's ``site.yaml``.

    path: CSV or Parquet file, relative to --data (or to the site's own folder).
    header: does a CSV's first line name the columns? (else they come in schema order).
    nulls: cells that mean "missing" (always also the empty cell). separator: CSV only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    format: str = ""
    header: bool = True
    nulls: tuple[str, ...] = ("",)
    separator: str = ","


def read_source(spec: SourceSpec, schema: TableSchema, base: Path) -> Table:
    """The table at *spec*, checked and typed as *schema* says, in file order.

    Raises SchemaError listing every way in which the table breaks the contract; messages
    name columns and count cells, and never show a cell.
    """
    path = base / spec.path
    if not path.is_file() or not os.access(path, os.R_OK):
        raise SchemaError(
            "source.missing-file",
            f"there is no readable file {spec.path}",
            field="path",
            remedy="check the site's source path and its permissions",
        )
    raw = _open(spec, path, schema)
    _check_columns(raw, schema)
    kept = {name: column for name, column in schema.columns.items() if column.role != "ignore"}
    typed = raw.select(**{f"{i}r": _text(raw[n], c, spec.nulls) for i, (n, c) in enumerate(kept.items())})
    typed = typed.mutate(**{f"{i}v": _typed(typed[f"{i}r"], c) for i, c in enumerate(kept.values())})
    _check_cells(typed, kept, schema)
    arrow = typed.select(*[f"{i}v" for i in range(len(kept))]).to_pyarrow()
    columns = {name: _array(arrow.column(f"{i}v"), column) for i, (name, column) in enumerate(kept.items())}
    return Table(schema, columns)


def _open(spec: SourceSpec, path: Path, schema: TableSchema) -> ir.Table:
    """The file as a table of the engine, all cells as text for CSV."""
    connection = ibis.duckdb.connect(threads=2)
    kind = spec.format or {".parquet": "parquet", ".pq": "parquet"}.get(path.suffix, "csv")
    try:
        if kind == "parquet":
            return connection.read_parquet(glob.escape(str(path)))
        if path.stat().st_size == 0:
            raise SchemaError("source.empty", "the file is empty", field="path", remedy="check the site's source")
        options: dict[str, Any] = {} if spec.header else {"names": list(schema.columns)}
        # The whole dialect is given: an engine that guesses it may take a row for a comment or a title.
        return connection.read_csv(
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
    except AtollError:
        raise
    except Exception:
        # The engine's message may quote the file's content, so it is not passed on.
        raise SchemaError(
            "source.unreadable",
            f"{spec.path} cannot be read as {kind}",
            field="path",
            remedy="check format, separator, header and encoding (UTF-8) of the source",
        ) from None


def _check_columns(raw: ir.Table, schema: TableSchema) -> None:
    """Missing, additional and renamed columns, all at once.

    Names that are not the schema's stay in the message, which does not leave the site; and when
    none is, they are not even written there: they may be the cells of a table without a header.
    """
    missing = [name for name in schema.columns if name not in raw.columns]
    extra = [name for name in raw.columns if name not in schema.columns]
    folded = {name.strip().casefold(): name for name in extra}
    if len(missing) == len(schema.columns) and not any(name.casefold() in folded for name in missing):
        raise SchemaError(
            "source.no-header",
            "the table has none of the schema's columns",
            field="header",
            remedy="check the separator, and set header: false if the first line is not the columns' names",
        )
    problems: list[AtollError] = []
    for name in missing:
        near = difflib.get_close_matches(name.casefold(), folded, 1)
        text = f"column {name!r} is missing" + (f"; did the table rename it to {folded[near[0]]!r}?" if near else "")
        remedy = "add or rename the column, or name the right table"
        problems.append(SchemaError("schema.missing-column", text, field=name, remedy=remedy))
    for name in extra:
        remedy = "remove it from the source, or declare it in the schema (role: ignore)"
        problems.append(SchemaError("schema.extra-column", f"column {name!r} is not in the schema", remedy=remedy))
    refuse_all(SchemaError, "schema.columns", problems)


def _text(cell: ir.Value, column: Column, nulls: tuple[str, ...]) -> ir.Value:
    """A cell as trimmed text, NULL where it is empty or one of the table's or column's codes for missing."""
    text = cell.cast("string").strip()
    codes = {"", *nulls, *(str(code) for code in column.null_values)}
    if column.numeric and (numbers := [float(code) for code in column.null_values if not isinstance(code, str)]):
        missing = text.isin(sorted(codes)) | text.try_cast("float64").isin(numbers).fill_null(False)
    else:
        missing = text.isin(sorted(codes))
    return ibis.ifelse(missing, ibis.null("string"), text)


def _typed(text: Any, column: Column) -> ir.Value:
    return text if column.dtype == "text" else text.try_cast(_IBIS_TYPE[column.dtype])


def _check_cells(typed: ir.Table, kept: dict[str, Column], schema: TableSchema) -> None:
    """Count the cells of every column that break the contract, in one query."""
    counts: dict[str, Any] = {"rows": typed.count()}
    for i, column in enumerate(kept.values()):
        raw, value = typed[f"{i}r"], typed[f"{i}v"]
        counts[f"{i}type"] = (raw.notnull() & value.isnull()).sum()
        counts[f"{i}missing"] = raw.isnull().sum()
        if column.numeric:
            finite = ~(value.isnan() | value.isinf())
            counts[f"{i}finite"] = (~finite).sum()
            if column.dtype == "integer":
                counts[f"{i}whole"] = (finite & (value != value.floor())).sum()
            if column.range is not None:
                counts[f"{i}range"] = (finite & ~value.between(*column.range)).sum()
        if column.values is not None:
            counts[f"{i}code"] = (value.notnull() & value.notin(list(column.values))).sum()
        if column.role == "entity":
            counts[f"{i}distinct"] = raw.nunique()
    try:
        found = {k: int(v or 0) for k, v in typed.aggregate(**counts).to_pyarrow().to_pylist()[0].items()}
    except Exception:
        raise SchemaError(
            "source.unreadable",
            "the table could not be read to its end",
            field="path",
            remedy="look for lines with too many or too few cells, and for cells that are not UTF-8",
        ) from None
    rows = found["rows"]
    if rows == 0:
        raise SchemaError("source.empty", "the table has no rows", field="path", remedy="check the site's source")
    problems: list[AtollError] = []
    if rows > schema.max_rows:
        problems.append(
            SchemaError("schema.too-many-rows", f"more than {schema.max_rows} rows", field="max_rows",
                        remedy="raise max_rows in the schema, at every site")
        )  # fmt: skip
    for i, (name, column) in enumerate(kept.items()):
        unit = f" {column.unit}" if column.unit else ""
        limits = f"[{column.range[0]:g}, {column.range[1]:g}]{unit}" if column.range else ""
        faults = (
            ("type", "schema.type", f"are not {_WHAT[column.dtype]}", "correct the cells, or the schema's dtype"),
            ("finite", "schema.not-finite", "are NaN or infinite", "leave missing cells empty"),
            ("whole", "schema.type", "are not whole numbers", "correct the cells, or use dtype: real"),
            ("range", "schema.range", f"are outside {limits}", "check the unit, or widen the schema's range"),
            ("code", "schema.code", "are not in the code list", "map the codes, or add them to the schema's values"),
        )
        for key, code, what, remedy in faults:
            if number := found.get(f"{i}{key}", 0):
                problems.append(
                    SchemaError(code, f"column {name!r}: {number} of {rows} cells {what}", field=name, remedy=remedy)
                )
        missing = found[f"{i}missing"]
        if missing and (column.missing == "forbid" or column.role == "entity"):
            problems.append(
                SchemaError("schema.missing", f"column {name!r}: {missing} of {rows} cells are missing", field=name,
                            remedy="fill the cells, or allow missing values in the schema")
            )  # fmt: skip
        if column.role == "entity" and (doubles := rows - missing - found[f"{i}distinct"]) > 0:
            problems.append(
                SchemaError("schema.duplicate-id", f"column {name!r}: {doubles} rows repeat an id", field=name,
                            remedy="remove duplicate rows before the study")
            )  # fmt: skip
    refuse_all(SchemaError, "schema.broken", problems)


def _array(column: Any, declared: Column) -> NDArray[Any]:
    """An Arrow column as the array that :class:`Table` documents."""
    if declared.numeric:
        return np.asarray(column.fill_null(float("nan")).to_numpy(), dtype=np.float64)
    if declared.dtype == "date":
        return np.asarray(column.to_numpy(), dtype="datetime64[D]")
    return np.array(column.to_pylist(), dtype=object)
