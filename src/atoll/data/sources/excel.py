"""Workbooks: .xlsx, .xls and .ods, one sheet of them, by calamine.

A row without any cell is no row. A cell that is merged over rows stands for each of them. Cells that hold an
error (#N/A, #DIV/0!) are missing: the format's readers do not tell them from empty ones.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ibis.expr.types as ir
from python_calamine import CalamineError, CalamineSheet, CalamineWorkbook

from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, named, source
from atoll.data.sources.cells import as_text, reader

MAX_BYTES = 2 << 30
"""Of an unpacked workbook; larger tables belong in a CSV, Parquet file or database."""
_SPANS = re.compile(rb'number-(?:rows|columns)-spanned="(?:[2-9]|1\d)')


@source("excel", ".xlsx", ".xlsm", ".xls", ".ods")
def open_excel(spec: SourceSpec, path: Path, schema: TableSchema | None, engine: Engine) -> ir.Table:
    """All cells as text, as they would stand in a CSV."""
    try:
        _check_container(path)
        with CalamineWorkbook.from_path(str(path)) as book:
            if spec.sheet and spec.sheet not in book.sheet_names:
                raise SchemaError(
                    "source.no-sheet", f"the workbook has no sheet {spec.sheet!r}", field="sheet",
                    remedy="name one of the workbook's sheets, or leave sheet out for the first",
                )  # fmt: skip
            sheet = book.get_sheet_by_name(spec.sheet) if spec.sheet else book.get_sheet_by_index(0)
            rows = _rows(sheet)
            first = next(rows, None)
            if first is None:
                raise SchemaError("source.empty", "the sheet is empty", field="path", remedy="check the site's source")
            if spec.header:
                return engine.load(reader(named([cell or "" for cell in first]), rows))
            names = list(schema.columns) if schema is not None else [f"c{n}" for n in range(1, len(first) + 1)]
            if len(names) != len(first):
                raise SchemaError(
                    "source.ragged", f"the sheet has {len(first)} columns and the schema {len(names)}", field="header",
                    remedy="name the right sheet, or write the columns' names in its first row",
                )  # fmt: skip
            return engine.load(reader(names, _from(first, rows)))
    except (CalamineError, IndexError, zipfile.BadZipFile):
        raise SchemaError(
            "source.unreadable", "the workbook cannot be read", field="path",
            remedy="open it in a spreadsheet program and save it anew, without a password",
        ) from None  # fmt: skip


def _rows(sheet: CalamineSheet) -> Iterator[list[str | None]]:
    """The rows that have any cell, as text, with merged cells filled down."""
    left = (sheet.start or (0, 0))[1]
    merged: dict[tuple[int, int], int] = {}  # (row, column) → the row whose value stands there
    for (first, column), (last, end) in sheet.merged_cell_ranges or ():
        merged.update({(row, column - left): first for row in range(first + 1, last + 1) if column == end})
    kept: dict[tuple[int, int], str | None] = {}
    heads = {(first, column) for (_, column), first in merged.items()}
    for number, row in enumerate(sheet.iter_rows()):
        cells = [as_text(cell) or None for cell in row]
        for place in range(len(cells) if merged else 0):
            if (number, place) in heads:
                kept[number, place] = cells[place]
            elif (number, place) in merged:
                cells[place] = kept[merged[number, place], place]
        if any(cell is not None for cell in row if cell != ""):
            yield cells


def _from(first: list[str | None], rest: Iterator[list[str | None]]) -> Iterator[list[str | None]]:
    yield first
    yield from rest


def _check_container(path: Path) -> None:
    """Refuse what unpacks to too much, and merged cells where the reader does not tell of them (.ods)."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        if sum(member.file_size for member in packed.infolist()) > MAX_BYTES:
            raise SchemaError(
                "source.too-large", "the workbook unpacks to more than 2 GiB", field="path",
                remedy="write the table as CSV or Parquet",
            )  # fmt: skip
        if path.suffix.lower() == ".ods" and "content.xml" in packed.namelist():
            before = b""
            with packed.open("content.xml") as content:
                while block := content.read(1 << 20):
                    if _SPANS.search(before + block):
                        raise SchemaError(
                            "source.merged-cells", "the workbook has merged cells", field="path",
                            remedy="unmerge and fill them, or save the workbook as .xlsx",
                        )  # fmt: skip
                    before = block[-64:]
