"""Where a site's table is, and how it is opened: one file for each kind of source, found by its registration.

A source delivers cells into the site's engine as they are: text where the format has no types. It
names no cell in an error. Everything else (codes for missing, the contract, preparation) happens there.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import ibis
import ibis.expr.types as ir
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.check import check_columns
from atoll.data.engine import Engine
from atoll.data.frame import ROW, Frame


class SourceSpec(BaseModel):
    """Where a site's table is. One entry of SITES.yaml or of a site's ``site.yaml``; the site's own.

    path: file or folder, relative to --data (or to the site's own folder). format: csv, parquet …
        (default: by the path's ending, or sql where there is a url).
    url: of a database, as Ibis connects to it (postgresql://user@host/name, sqlite:///file …), with
        table (perhaps schema.table) or query: what to read there. password_env: the environment
        variable that holds the password, so that it stands in no file. table: also the file of
        labels in a folder of images.
    header: does the first line name the columns? (else they come in schema order).
    separator: of a CSV (default: tab for .tsv, else comma). encoding: of text (default: UTF-8).
    sheet: of a workbook (default: the first).
    nulls: cells that mean "missing" (always also the empty cell).
    columns: the table's own names for the contract's columns (contract's name → name there).
    units: units in which this table has columns, where they are not the schema's (see the step "units").
    extra: "refuse" columns that the contract does not know, or "ignore" them (default for databases).
    timeout_s: seconds that reading may take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = ""
    format: str = ""
    url: str = ""
    table: str = ""
    query: str = ""
    password_env: str = ""
    header: bool = True
    nulls: tuple[str, ...] = ("",)
    separator: str = Field(default="", max_length=1)
    encoding: str = "utf-8"
    sheet: str = ""
    columns: Mapping[str, str] = Field(default_factory=dict)
    units: Mapping[str, str] = Field(default_factory=dict)
    extra: Literal["", "refuse", "ignore"] = ""
    timeout_s: float | None = Field(default=None, gt=0)
    _reads: tuple[str, ...] | None = PrivateAttr(())  # what the recipe adds to the contract's columns: see `wanted`


Opener = Callable[[SourceSpec, Path, TableSchema | None, Engine], ir.Table]
"""(spec, the file's path, schema or None where there is none yet, engine) → the raw table inside the
engine, perhaps with ROW; raises SchemaError."""

SOURCES: dict[str, Opener] = {}
ENDINGS: dict[str, str] = {}
REMOTE = ("sql",)
"""Formats without a path."""
FOLDERS = ("images",)
"""Formats whose path may be a folder."""


def source(name: str, *endings: str) -> Callable[[Opener], Opener]:
    """Register how the format *name* is opened, also for paths with these *endings* (".xlsx")."""

    def register(opener: Opener) -> Opener:
        SOURCES[name] = opener
        ENDINGS.update(dict.fromkeys(endings, name))
        return opener

    return register


def open_source(
    spec: SourceSpec, schema: TableSchema, base: Path, engine: Engine, reads: tuple[str, ...] | None = ()
) -> Frame:
    """The table at *spec* in the engine, with the contract's names, before any cleaning: text is trimmed, and
    cells that mean "missing" are NULL. reads: columns that a database is asked for besides the contract's, under
    the contract's names or its own; None: all. Raises SchemaError naming the file and the remedy."""
    spec = spec.model_copy()
    spec._reads = reads
    return Frame(engine, open_cells(spec, schema, base, engine), schema, units=spec.units)


def open_cells(spec: SourceSpec, schema: TableSchema | None, base: Path, engine: Engine) -> ir.Table:
    """What :func:`open_source` is about, with ROW; also without a schema: then with all columns, and where no
    line names them they are called c1, c2 …"""
    kind = spec.format or ("sql" if spec.url else _by_ending(spec.path))
    if kind not in SOURCES:
        raise SchemaError(
            "source.unknown-format", f"there is no source format {kind!r}", field="format",
            remedy=f"known: {', '.join(sorted(SOURCES))}",
        )  # fmt: skip
    path = base / spec.path
    there = spec.path and (path.is_file() or (kind in FOLDERS and path.is_dir()))
    if kind not in REMOTE and not (there and os.access(path, os.R_OK)):
        raise SchemaError(
            "source.missing-file",
            f"there is no readable file {spec.path}",
            field="path",
            remedy="check the site's source path and its permissions",
        )
    with engine.within(spec.timeout_s):
        raw = SOURCES[kind](spec, path, schema, engine)
        ours = {theirs: name for name, theirs in spec.columns.items()}
        names = {ours.get(name, name): raw[name] for name in raw.columns}
        if len(names) < len(raw.columns):
            raise repeated_columns()
        table = raw.select(**{name: _present(cell, spec.nulls) for name, cell in names.items()})
        if ROW in raw.columns:
            return table
        kept = engine.keep(table, number=ROW)
        if raw.get_name().startswith("kept "):  # once is enough
            engine.backend.con.execute(f'DROP TABLE "{raw.get_name()}"')
        return kept


def known_columns(frame: Frame, spec: SourceSpec) -> Frame:
    """*frame* with exactly the contract's columns; raises SchemaError listing what is missing or too much."""
    extra = spec.extra or ("ignore" if spec.url or spec.table or spec.query else "refuse")
    check_columns([name for name in frame.table.columns if name != ROW], frame.schema, extra=extra)
    return frame.replace({}, frame.schema)


def wanted(spec: SourceSpec, schema: TableSchema | None, there: list[str]) -> list[str]:
    """Of the columns *there* in a database's table, those that the contract knows or cleaning reads; all of a
    query's, and all where cleaning looks at every name."""
    if spec.query or spec._reads is None:
        return there
    known = {spec.columns.get(name, name) for name in (*(schema.columns if schema is not None else ()), *spec._reads)}
    return [name for name in there if name in known] or there


def named(header: list[str]) -> list[str]:
    """Columns' names from a table's first row: trimmed, c1, c2 … where there is none; raises SchemaError."""
    names = [cell.strip() or f"c{number}" for number, cell in enumerate(header, 1)]
    if len({name.casefold() for name in names}) < len(names):  # SQL does not tell capitals apart
        raise repeated_columns()
    return names


def repeated_columns() -> SchemaError:
    """Two columns of one name. It is not written: it may be a cell of a table without a header."""
    return SchemaError(
        "source.repeated-column", "two of the table's columns have the same name", field="header",
        remedy="rename one of them, or set header: false if the first line is not the columns' names",
    )  # fmt: skip


def _by_ending(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes if suffix.lower() not in (".gz", ".zst")]
    return ENDINGS.get(suffixes[-1] if suffixes else "", "csv")


def _present(cell: Any, nulls: tuple[str, ...]) -> ir.Value:
    """A cell, NULL where it is one of the table's texts for missing; text is trimmed. Truth is 0 or 1, exact
    decimals and what the contract has no type for are text, and times with a zone are UTC."""
    kind = cell.type()
    if kind.is_boolean():
        return cell.cast("int8")
    if kind.is_timestamp() and kind.timezone is not None:
        return cell.cast("timestamp(6)")
    if kind.is_decimal() or kind.is_uuid() or kind.is_time() or kind.is_interval():
        return cell.cast("string")
    if not kind.is_string():
        return cell
    text = cell.strip()
    return ibis.ifelse(text.isin(sorted({"", *nulls})), ibis.null("string"), text)


for _module in pkgutil.iter_modules(__path__, __name__ + "."):
    importlib.import_module(_module.name)
