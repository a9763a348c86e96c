"""Workbooks. files/sheet.xls was written once with xlwt 1.3.0; .xlsx are written here by openpyxl, .ods by hand."""

from __future__ import annotations

import datetime as dt
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pytest

COLUMNS = {
    "id": {"dtype": "text", "role": "entity"},
    "x": {"range": [-10, 1e6]},
    "day": {"dtype": "date"},
    "at": {"dtype": "datetime"},
    "ok": {"dtype": "integer", "values": [0, 1]},
}
CANARY = "7731977.31"
ODS = (
    '<?xml version="1.0" encoding="UTF-8"?><office:document-content'
    ' xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0"'
    ' xmlns:table="urn:oasis:names:tc:opendocument:xmlns:table:1.0"'
    ' xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0" office:version="1.2"><office:body>'
    '<office:spreadsheet><table:table table:name="S">{}</table:table></office:spreadsheet></office:body>'
    "</office:document-content>"
)

MANIFEST = (
    '<manifest:manifest xmlns:manifest="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0">'
    '<manifest:file-entry manifest:full-path="/"'
    ' manifest:media-type="application/vnd.oasis.opendocument.spreadsheet"/></manifest:manifest>'
)


def workbook(path: Path, rows: list[list[Any]], *, title: str = "one", merged: str = "", top: int = 0) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = title
    for number, row in enumerate(rows, 1 + top):
        for place, cell in enumerate(row, 1 + top):
            sheet.cell(number, place, cell)
    if merged:
        sheet.merge_cells(merged)
    book.create_sheet("empty")
    book.save(path)


ROWS: list[list[Any]] = [
    list(COLUMNS),
    ["00123", 1.0, dt.date(2024, 2, 29), dt.datetime(2024, 1, 2, 3, 4, 5), True],
    [None] * 5,
    ["中文", -0.25, dt.datetime(1999, 12, 31), dt.datetime(2024, 1, 1), False],
    [7, 123456, None, None, None],
]


@pytest.mark.parametrize("top", [0, 2])
def test_a_sheet_is_read_and_typed(tmp_path: Path, read_table: Any, top: int) -> None:
    workbook(tmp_path / "t.xlsx", ROWS, top=top)
    table = read_table(COLUMNS, path="t.xlsx", sheet="one")
    assert table["id"].tolist() == ["00123", "中文", "7"]
    assert table["x"].tolist() == [1, -0.25, 123456]
    assert table["day"].tolist() == [dt.date(2024, 2, 29), dt.date(1999, 12, 31), None]
    assert table["at"].tolist()[:2] == [dt.datetime(2024, 1, 2, 3, 4, 5), dt.datetime(2024, 1, 1)]
    assert np.array_equal(table["ok"], [1, 0, np.nan], equal_nan=True)


def test_header_false_and_the_old_format(tmp_path: Path, read_table: Any, refused: Any) -> None:
    workbook(tmp_path / "t.xlsx", ROWS[1:])
    assert len(read_table(COLUMNS, path="t.xlsx", header=False)) == 3
    assert refused({"id": COLUMNS["id"]}, path="t.xlsx", header=False).code == "source.ragged"
    old = {"id": COLUMNS["id"], "x": COLUMNS["x"], "day": COLUMNS["day"], "note": {"dtype": "text"}}
    table = read_table(old, Path(__file__).parent / "files", path="sheet.xls", sheet="数据")
    assert table["x"].tolist() == [1, 0.1 + 0.2, -7]
    assert table["day"].tolist() == [dt.date(2024, 2, 29), dt.date(1999, 12, 31), None]
    assert table["note"].tolist() == ["中文", None, "x"]


@pytest.mark.parametrize("top", [0, 3])
def test_cells_merged_over_rows_stand_for_each(tmp_path: Path, read_table: Any, top: int) -> None:
    columns = {"ward": {"dtype": "text"}, "x": {"range": [0, 9]}}
    rows = [["ward", "x"], ["north", 1], [None, 2], [None, 3], ["south", 4]]
    letter = "AD"[top > 0]
    workbook(tmp_path / "t.xlsx", rows, merged=f"{letter}{2 + top}:{letter}{4 + top}", top=top)
    assert read_table(columns, path="t.xlsx")["ward"].tolist() == ["north"] * 3 + ["south"]


def ods(path: Path, attribute: str = "") -> None:
    cells = [
        [f'<table:table-cell office:value-type="string"{attribute}><text:p>id</text:p></table:table-cell>',
         '<table:table-cell office:value-type="string"><text:p>day</text:p></table:table-cell>'],
        ['<table:table-cell office:value-type="string"><text:p>中</text:p></table:table-cell>',
         '<table:table-cell office:value-type="date" office:date-value="2024-02-29"/>'],
    ]  # fmt: skip
    rows = "".join(f"<table:table-row>{''.join(row)}</table:table-row>" for row in cells)
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        packed.writestr("META-INF/manifest.xml", MANIFEST)
        packed.writestr("content.xml", ODS.format(rows))


def test_open_document(tmp_path: Path, read_table: Any, refused: Any) -> None:
    columns = {"id": COLUMNS["id"], "day": COLUMNS["day"]}
    ods(tmp_path / "t.ods")
    table = read_table(columns, path="t.ods")
    assert table["id"].tolist() == ["中"]
    assert table["day"].tolist() == [dt.date(2024, 2, 29)]
    ods(tmp_path / "m.ods", ' table:number-rows-spanned="2"')
    assert refused(columns, path="m.ods").code == "source.merged-cells"


def test_what_cannot_be_read(tmp_path: Path, refused: Any) -> None:
    workbook(tmp_path / "t.xlsx", ROWS)
    assert refused(COLUMNS, path="t.xlsx", sheet="two").code == "source.no-sheet"
    assert refused(COLUMNS, path="t.xlsx", sheet="empty").code == "source.empty"
    workbook(tmp_path / "r.xlsx", [["id", "x", " ID"], ["a", 1, CANARY]])
    assert refused(COLUMNS, path="r.xlsx").code == "source.repeated-column"
    (tmp_path / "b.xlsx").write_text(CANARY)
    assert refused(COLUMNS, path="b.xlsx").code == "source.unreadable"
    workbook(tmp_path / "c.xlsx", [list(COLUMNS), ["a", CANARY + "x", None, None, None]])
    assert refused(COLUMNS, path="c.xlsx").code == "schema.type"
