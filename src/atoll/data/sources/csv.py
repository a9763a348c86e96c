"""Delimited text: CSV, TSV and the like, in any encoding, perhaps compressed (gzip, zstd)."""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

import ibis.expr.types as ir

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine, telling
from atoll.data.frame import ROW
from atoll.data.sources import SourceSpec, named, source
from atoll.data.sources.encoding import as_utf8, check_utf8, compression, opened, spooled

csv.field_size_limit(16 << 20)
"""Characters of a cell, here where files are looked through that the engine refused."""


@source("csv", ".csv", ".tsv", ".txt", ".data")
def open_csv(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """All cells as text. The whole dialect is given: an engine that guesses may take a row for a comment or a title."""
    separator = spec.separator or ("\t" if ".tsv" in [suffix.lower() for suffix in path.suffixes] else ",")
    with as_utf8(path, spec.encoding, engine) as plain:
        names: list[str] = []
        with suppress(UnicodeError):  # check_utf8 tells of it
            names = _names(plain, separator, spec, schema)
        if names:
            try:
                return _kept(plain, names, separator, engine, header=spec.header)
            except SchemaError as error:
                if error.code != "source.unreadable":
                    raise
        check_utf8(plain)
        with spooled(engine) as tidy:  # strict parsers refuse some files that are not ambiguous
            _write_tidy(plain, tidy, len(names), separator)
            return _kept(tidy, names, ",", engine, header=spec.header)


def _kept(path: Path, names: list[str], separator: str, engine: Engine, *, header: bool) -> ir.Table:
    with telling():
        table: ir.Table = engine.backend.read_csv(
            glob.escape(str(path)), auto_detect=False, columns=dict.fromkeys(names, "VARCHAR"), header=header,
            sep=separator, quote='"', escape='"', comment="", skip=0, nullstr="", compression=compression(path),
        )  # fmt: skip
    return engine.keep(table, number=ROW)


def _names(path: Path, separator: str, spec: SourceSpec, schema: TableSchema | None) -> list[str]:
    with opened(path) as file, closing(_rows(file, separator)) as rows:
        first = next((row for _, row in rows if row), None)
    if first is None:
        raise SchemaError("source.empty", "the file is empty", field="path", remedy="check the site's source")
    if spec.header:
        return named(first)
    return list(schema.columns) if schema is not None else [f"c{number}" for number in range(1, len(first) + 1)]


def _rows(file: IO[bytes], separator: str) -> Generator[tuple[int, list[str]]]:
    """(line it begins at, cells) of every row. Raises SchemaError where quotes are not closed."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    reader = csv.reader(text, delimiter=separator, strict=True)
    begins = 1
    try:
        for row in reader:
            yield begins, row
            begins = reader.line_num + 1
    except csv.Error:
        raise SchemaError(
            "source.quotes", f"a quoted cell that begins at line {begins} does not end, or text follows it",
            field="path", remedy="write a quote inside a quoted cell twice",
        ) from None  # fmt: skip
    finally:
        text.detach()


def _write_tidy(path: Path, tidy: Path, width: int, separator: str) -> None:
    """The same rows in the plainest dialect. Raises SchemaError if one has too few or too many cells."""
    few = many = number = first = 0
    with (
        opened(path) as file,
        closing(_rows(file, separator)) as rows,
        tidy.open("w", encoding="utf-8", newline="") as out,
    ):
        writer = csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for line, row in rows:
            if not row:
                continue
            number += 1
            if len(row) == width + 1 and not row[-1]:  # a separator at the line's end
                row.pop()
            few, many = few + (len(row) < width), many + (len(row) > width)
            first = first or (line if len(row) != width else 0)
            writer.writerow(row)
    if first:
        raise SchemaError(
            "source.ragged",
            f"{few} of {number} rows have fewer than {width} cells and {many} have more; the first is at line {first}",
            field="path", remedy="quote cells that contain the separator or a line break, and check the separator",
        )  # fmt: skip
