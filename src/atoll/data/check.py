"""Checking a site's table against the data contract.

Cells that come as text stay text until here, so that one malformed cell is a counted problem
of one column and not a failure of the whole read. All checks are one aggregate query inside
the engine; messages name columns and count cells, and never show a cell.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

import ibis
import ibis.expr.types as ir

from atoll.contract.errors import AtollError, SchemaError, refuse_all
from atoll.contract.schema import Column, TableSchema
from atoll.data.frame import ID, ROW, Frame

_IBIS_TYPE = {
    "real": "float64", "integer": "float64", "text": "string", "date": "date", "datetime": "timestamp(6)",
    "image": "binary",
}  # fmt: skip
_WHAT = {
    "real": "numbers", "integer": "whole numbers", "text": "text", "date": "dates (YYYY-MM-DD)",
    "datetime": "dates with times (YYYY-MM-DD HH:MM:SS)", "image": "images",
}  # fmt: skip
_MEND = {
    **dict.fromkeys(("real", "integer"), "correct the cells, read them with the step numbers, or change the dtype"),
    **dict.fromkeys(("date", "datetime"), "correct the cells, or read them with the step dates"),
    **dict.fromkeys(("text", "image"), "correct the cells, or the schema's dtype"),
}
_GRAIN_S = {"d": 86_400, "h": 3600, "min": 60, "s": 1}


def checked(frame: Frame) -> Frame:
    """*frame* (cells as a source or cleaning left them) with every column typed as its schema says.

    Raises SchemaError listing every way in which the table breaks the contract.
    """
    schema = frame.schema
    kept = {name: column for name, column in schema.columns.items() if column.role != "ignore"}
    cells = frame.table.select(
        ROW, **{f"{i}r": _cell(frame.table[name], column) for i, (name, column) in enumerate(kept.items())}
    )
    typed = cells.mutate(**{f"{i}v": _typed(cells[f"{i}r"], column) for i, column in enumerate(kept.values())})
    _check_cells(typed, kept, schema, frame)
    columns = {name: typed[f"{i}v"] for i, name in enumerate(kept)}
    entities = [name for name, column in kept.items() if column.role == "entity"]
    identity = ibis.struct({name: columns[name] for name in entities or kept}).hash()
    return replace(frame, table=typed.select(ROW, **columns, **{ID: identity}))


def check_columns(columns: list[str], schema: TableSchema, *, extra: str = "refuse") -> None:
    """Missing, additional and renamed columns, all at once.

    Names that are not the schema's stay in the message, which does not leave the site; and when
    none is, they are not even written there: they may be the cells of a table without a header.
    """
    missing = [name for name in schema.columns if name not in columns]
    unknown = [name for name in columns if name not in schema.columns]
    folded = {name.strip().casefold(): name for name in unknown}
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
    for name in unknown if extra == "refuse" else ():
        remedy = "remove it from the source, declare it in the schema (role: ignore), or set the source's extra: ignore"
        problems.append(SchemaError("schema.extra-column", f"column {name!r} is not in the schema", remedy=remedy))
    refuse_all(SchemaError, "schema.columns", problems)


def _cell(cell: Any, column: Column) -> ir.Value:
    """A cell with the column's own codes for missing left out."""
    if not column.null_values:
        return cell
    if cell.type().is_string():
        missing = cell.isin(sorted(str(code) for code in column.null_values))
        numbers = [float(code) for code in column.null_values if not isinstance(code, str)]
        if column.numeric and numbers:
            missing = missing | cell.try_cast("float64").isin(numbers).fill_null(False)
    else:
        missing = cell.isin([code for code in column.null_values if not isinstance(code, str)])
    return ibis.ifelse(missing, ibis.null(str(cell.type())), cell)


def _typed(cell: Any, column: Column) -> ir.Value:
    """The cell as the engine's type for the column; NULL where it cannot be."""
    kind, wanted = cell.type(), _IBIS_TYPE[column.dtype]
    if column.dtype == "text" or kind == ibis.dtype(wanted):
        return cell.cast("string") if column.dtype == "text" else cell
    if kind.is_string() or kind.is_numeric() == column.numeric:
        return cell.try_cast(wanted)
    return cell.cast("string").try_cast(wanted)


def _check_cells(typed: ir.Table, kept: dict[str, Column], schema: TableSchema, frame: Frame) -> None:
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
        if column.grain is not None:
            number, unit = int("".join(filter(str.isdigit, column.grain))), column.grain.lstrip("0123456789")
            seconds = value.cast("timestamp(6)").epoch_seconds()
            counts[f"{i}grain"] = (seconds % (number * _GRAIN_S[unit]) != 0).sum()
        if column.role == "time" and column.dtype in ("date", "datetime"):
            counts[f"{i}future"] = (value.cast("date") > ibis.today() + ibis.interval(days=1)).sum()
        if column.values is not None:
            counts[f"{i}code"] = (value.notnull() & value.notin(list(column.values))).sum()
        if column.role == "entity":
            counts[f"{i}distinct"] = raw.nunique()
    found = {k: int(v or 0) for k, v in frame.engine.row(typed.aggregate(**counts)).items()}
    rows = found["rows"]
    if rows == 0 and (left := sum(frame.dropped.values())):
        why = ", ".join(f"{number} {reason}" for reason, number in frame.dropped.items() if number)
        raise SchemaError(
            "schema.nothing-left", f"the recipe leaves out all {left} rows: {why}", field="recipe",
            remedy="mend the table, leave the cleaning step out, or the site",
        )  # fmt: skip
    if rows == 0:
        raise SchemaError("source.empty", "the table has no rows", field="source", remedy="check the site's source")
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
            ("type", "schema.type", f"are not {_WHAT[column.dtype]}", _MEND[column.dtype]),
            ("finite", "schema.not-finite", "are NaN or infinite", "leave missing cells empty"),
            ("whole", "schema.type", "are not whole numbers", "correct the cells, or use dtype: real"),
            (
                "range",
                "schema.range",
                f"are outside {limits}",
                "check the unit (step units), or widen the schema's range",
            ),
            ("grain", "schema.grain", f"are not multiples of {column.grain}", "align the times in the recipe"),
            ("future", "schema.future", "are in the future", "correct the dates; a day ahead is allowed"),
            (
                "code",
                "schema.code",
                "are not in the code list",
                "map the codes (step codes), or add them to the schema's values",
            ),
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
                            remedy="remove duplicate rows (step deduplicate)")
            )  # fmt: skip
    refuse_all(SchemaError, "schema.broken", problems)
