"""Reading a site's file: every way to be no table of the contract's columns has its code, and none shows a cell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from atoll.contract.errors import SchemaError
from atoll.data.sources import SourceSpec

from .written import (
    CANARY,
    COLUMNS,
    DIGITS,
    HEADER,
    ROW,
    read,
    read_source,
    refused,
    rows,
    same,
    schema_of,
)


def test_a_good_table_is_read_and_typed(tmp_path: Path) -> None:
    table = read(tmp_path, rows({}, {"weight": "", "sex": "", "ward": "", "day": ""}))
    assert list(table.columns) == ["id", "weight", "visits", "sex", "ward", "day"]  # what is ignored is not read
    assert table["id"].tolist() == ["p1", "p2"]
    assert table["weight"].dtype == table["visits"].dtype == np.float64
    assert table["weight"][0] == 70.5
    assert np.isnan(table["weight"][1])
    assert np.isnan(table["sex"][1])
    assert table["ward"].tolist() == ["north", None]
    assert table["day"].dtype == np.dtype("datetime64[D]")
    assert table["day"][0] == np.datetime64("2024-02-29")
    assert np.isnat(table["day"][1])
    assert len(table) == 2
    assert table.held_out is None


# ---------------------------------------------------------------- the file


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SchemaError) as caught:
        read_source(SourceSpec(path="none.csv"), schema_of(), tmp_path)
    assert caught.value.code == "source.missing-file"
    assert "none.csv" in str(caught.value)
    assert caught.value.remedy


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(SchemaError) as caught:
        read_source(SourceSpec(path="."), schema_of(), tmp_path)
    assert caught.value.code == "source.missing-file"


@pytest.mark.parametrize("content", ["", HEADER, HEADER + "\n", HEADER + "\r\n"], ids=["empty", "h", "hn", "hrn"])
def test_empty_and_header_only_files(tmp_path: Path, content: str) -> None:
    assert refused(tmp_path, content).code == "source.empty"


@pytest.mark.parametrize(
    "content",
    [
        f"{HEADER}\n{ROW}\np2,{CANARY},3\n",
        f"{HEADER}\n{ROW}\np2,{CANARY},3,1,north,2024-01-01,x,{CANARY}\n",
        f"{HEADER}\np2,{CANARY},3,1,north,2024-01-01,x,{CANARY}\n",
        f"{HEADER},{CANARY}\n{ROW}\n{ROW}\n",
        f"export of {CANARY}\n{HEADER}\n{ROW}\n",
        f'{HEADER}\n{ROW}\np2,"{CANARY},3,1,north,2024-01-01,x\n',
    ],
    ids=["too few cells", "too many cells", "all rows too long", "header too long", "a title line", "open quote"],
)
def test_ragged_rows_are_refused_and_never_dropped(tmp_path: Path, content: str) -> None:
    assert refused(tmp_path, content).code in ("source.ragged", "source.quotes")


def test_a_ragged_row_far_down_is_refused(tmp_path: Path) -> None:
    lines = [HEADER, *(ROW.replace("p1", f"p{i}") for i in range(30_000)), f"p,{CANARY}", ROW]
    error = refused(tmp_path, "\n".join(lines))
    assert error.code == "source.ragged"
    assert "1 of 30003 rows have fewer than 7 cells and 0 have more; the first is at line 30002" in str(error)


@pytest.mark.parametrize("place", [3, 30_000], ids=["near", "far"])
def test_bytes_that_are_not_utf8(tmp_path: Path, place: int) -> None:
    lines = [HEADER, *(ROW.replace("p1", f"p{i}") for i in range(place))]
    content = "\n".join(lines).encode() + f"\nM\xfcller{CANARY},70,3,1,north,,x\n".encode("latin-1")
    error = refused(tmp_path, content)
    assert error.code == "source.encoding"
    assert "windows-1252" in error.remedy


def test_wrong_separator(tmp_path: Path) -> None:
    content = rows({"weight": CANARY}).replace(",", ";")
    error = refused(tmp_path, content)
    assert error.code == "source.no-header"
    assert "separator" in error.remedy
    assert refused(tmp_path, content, header=False).code == "source.ragged"
    assert len(read(tmp_path, rows({}).replace(",", ";"), separator=";")) == 1


def test_a_file_without_header_does_not_show_its_first_row(tmp_path: Path) -> None:
    """Read as if it had one, the first person's cells would be column names."""
    content = "".join(f"p{i},{CANARY},3,1,north,2024-01-01,{DIGITS}\n" for i in range(3))
    error = refused(tmp_path, content)
    assert error.code == "source.no-header"
    assert "header: false" in error.remedy


def test_header_false_uses_the_schemas_order(tmp_path: Path) -> None:
    table = read(tmp_path, "p1,70.5,3,1,north,2024-02-29,x\np2,71,4,0,south,,x\n", header=False)
    assert table["visits"].tolist() == [3, 4]
    assert table["ward"].tolist() == ["north", "south"]
    with_header_line = refused(tmp_path, rows({}), header=False)
    assert with_header_line.code == "schema.broken"


@pytest.mark.parametrize("width", [6, 8])
def test_header_false_with_another_number_of_columns(tmp_path: Path, width: int) -> None:
    cells = ["p1", "70.5", "3", "1", "north", "2024-02-29", CANARY, CANARY][:width]
    error = refused(tmp_path, ",".join(cells) + "\n" + ",".join(cells) + "\n", header=False)
    assert error.code == "source.ragged"


def test_line_ends_byte_order_mark_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    plain = read(tmp_path, rows({}, {"weight": "80"}))
    for content in (
        "\ufeff" + rows({}, {"weight": "80"}),
        rows({}, {"weight": "80"}).replace("\n", "\r\n"),
        rows({}, {"weight": "80"}).rstrip("\n"),
        rows({}, {"weight": "80"}).replace("\n", "\n\n"),
    ):
        same(read(tmp_path, content), plain)


def test_names_that_look_like_patterns_are_plain_names(tmp_path: Path) -> None:
    (tmp_path / "t[1].csv").write_text("a\n1\n")
    (tmp_path / "t1.csv").write_text("a\n2\n")
    schema = schema_of({"a": {"range": [0, 9]}})
    assert read_source(SourceSpec(path="t[1].csv"), schema, tmp_path)["a"].tolist() == [1]


# ---------------------------------------------------------------- the columns


def test_missing_extra_and_renamed_columns_are_all_listed(tmp_path: Path) -> None:
    content = rows({"weight": CANARY}).replace("weight", "wieght").replace(",sex", "").replace("visits", "VISITS")
    lines = [line if i == 0 else line.replace(",1,north", ",north") for i, line in enumerate(content.splitlines())]
    error = refused(tmp_path, "\n".join(lines))
    assert error.code == "schema.columns"
    assert [(part.code, part.field) for part in error.parts] == [
        ("schema.missing-column", "weight"),
        ("schema.missing-column", "visits"),
        ("schema.missing-column", "sex"),
        ("schema.extra-column", ""),
        ("schema.extra-column", ""),
    ]
    weight, visits, sex = error.parts[:3]
    assert "'wieght'" in str(weight)
    assert "'VISITS'" in str(visits)
    assert "rename it to" not in str(sex)


def test_names_outside_the_schema_stay_at_the_site(tmp_path: Path) -> None:
    error = refused(tmp_path, "id,weight,surname_of_the_person\np1,70,x\n", schema_of({"id": COLUMNS["id"]}))
    assert "surname_of_the_person" in str(error)
    assert "surname_of_the_person" not in str(error.public())


def test_one_missing_column_is_the_error_itself(tmp_path: Path) -> None:
    error = refused(tmp_path, "id,note\np1,x\n", schema_of({n: COLUMNS[n] for n in ("id", "sex", "note")}))
    assert (error.code, error.field) == ("schema.missing-column", "sex")


def test_a_repeated_column_name_is_refused(tmp_path: Path) -> None:
    schema = schema_of({"a": {"range": [0, 9]}, "b": {"range": [0, 9]}})
    assert refused(tmp_path, "a,b,a\n1,2,3\n", schema).code == "source.repeated-column"
