"""Reading a site's table: every way to break the contract has its code, and none shows a cell."""

from __future__ import annotations

import csv
import datetime as dt
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from atoll.contract.errors import AtollError, SchemaError
from atoll.contract.plan import Plan
from atoll.contract.schema import Column, TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table

COLUMNS: dict[str, dict[str, Any]] = {
    "id": {"dtype": "text", "role": "entity"},
    "weight": {"dtype": "real", "unit": "kg", "range": [20, 300]},
    "visits": {"dtype": "integer", "range": [0, 100], "missing": "forbid"},
    "sex": {"dtype": "integer", "values": [0, 1]},
    "ward": {"dtype": "text", "values": ["north", "south"]},
    "day": {"dtype": "date", "role": "time"},
    "note": {"role": "ignore"},
}
HEADER = ",".join(COLUMNS)
ROW = "p1,70.5,3,1,north,2024-02-29,free text"
CANARY = "7731977.31"  # stands for any cell of a person; must not be seen in an error
DIGITS = "31977"


def schema_of(columns: Mapping[str, Any] = COLUMNS, **more: Any) -> TableSchema:
    return TableSchema(name="test", columns={name: Column(**column) for name, column in columns.items()}, **more)


def read_source(spec: SourceSpec, schema: TableSchema, base: Path) -> Table:
    return checked(known_columns(open_source(spec, schema, base, Engine()), spec)).to_table()


def read(folder: Path, content: str | bytes, schema: TableSchema | None = None, **spec: Any) -> Table:
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "table.csv").write_bytes(data)
    return read_source(SourceSpec(path="table.csv", **spec), schema or schema_of(), folder)


def refused(folder: Path, content: str | bytes, schema: TableSchema | None = None, **spec: Any) -> SchemaError:
    with pytest.raises(SchemaError) as caught:
        read(folder, content, schema, **spec)
    _shows_no_cell(caught.value)
    return caught.value


def _shows_no_cell(error: AtollError) -> None:
    chain: BaseException | None = error
    while chain is not None and not (chain is not error and chain.__suppress_context__):
        assert DIGITS not in f"{chain} {chain!r}"
        chain = chain.__cause__ if chain.__suppress_context__ or chain.__cause__ else chain.__context__
    assert DIGITS not in str(error.public())
    for part in error.parts:
        assert DIGITS not in f"{part} {part.message} {part.public()}"


def rows(*cells: Mapping[str, str]) -> str:
    """A CSV whose rows are the good row with some cells replaced, and ids of their own."""
    lines = [HEADER]
    for number, changed in enumerate(cells, 1):
        made = dict(zip(COLUMNS, ROW.split(","), strict=True)) | {"id": f"p{number}"} | dict(changed)
        lines.append(",".join(made.values()))
    return "\n".join(lines) + "\n"


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
        _same(read(tmp_path, content), plain)


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


# ---------------------------------------------------------------- the cells

BROKEN = [
    ("weight", CANARY + "x", "schema.type", "not numbers"),
    ("weight", "7731977,31", "schema.type", "not numbers"),
    ("weight", "NaN", "schema.not-finite", "NaN or infinite"),
    ("weight", "-inf", "schema.not-finite", "NaN or infinite"),
    ("weight", "Infinity", "schema.not-finite", "NaN or infinite"),
    ("weight", "77319.77", "schema.range", "[20, 300] kg"),
    ("weight", "70500", "schema.range", "[20, 300] kg"),
    ("weight", "-70.5", "schema.range", "[20, 300] kg"),
    ("visits", "31.977", "schema.type", "not whole numbers"),
    ("visits", "many31977", "schema.type", "not whole numbers"),
    ("visits", "", "schema.missing", "missing"),
    ("visits", "   ", "schema.missing", "missing"),
    ("sex", "2", "schema.code", "code list"),
    ("sex", "female31977", "schema.type", "not whole numbers"),
    ("ward", "east31977", "schema.code", "code list"),
    ("ward", "North", "schema.code", "code list"),
    ("day", "31.12.1977", "schema.type", "dates"),
    ("day", "2023-02-29", "schema.type", "dates"),
    ("id", "", "schema.missing", "missing"),
    ("id", "p3", "schema.duplicate-id", "repeat"),
]


@pytest.mark.parametrize(("column", "cell", "code", "text"), BROKEN, ids=[f"{c}={v!r}" for c, v, _, _ in BROKEN])
def test_a_broken_cell(tmp_path: Path, column: str, cell: str, code: str, text: str) -> None:
    content = rows({}, {column: f'"{cell}"'}, {}, {}, {})
    error = refused(tmp_path, content)
    assert (error.code, error.field) == (code, column)
    assert f"column {column!r}: 1 " in str(error)
    assert text in str(error)
    assert error.remedy
    if code != "schema.duplicate-id":
        assert "1 of 5 cells" in str(error)


def test_broken_cells_are_counted(tmp_path: Path) -> None:
    content = rows(*[{"weight": CANARY if i % 3 else "70"} for i in range(10)])
    assert "column 'weight': 6 of 10 cells" in str(refused(tmp_path, content))


def test_several_problems_are_all_listed(tmp_path: Path) -> None:
    content = rows(
        {"weight": CANARY, "visits": "3.5"},
        {"weight": CANARY + "x", "ward": f"east{DIGITS}"},
        {"visits": "", "sex": "7"},
        {"day": DIGITS, "id": "p1"},
    )
    error = refused(tmp_path, content)
    assert error.code == "schema.broken"
    assert [(part.code, part.field) for part in error.parts] == [
        ("schema.duplicate-id", "id"),
        ("schema.type", "weight"),
        ("schema.range", "weight"),
        ("schema.type", "visits"),
        ("schema.missing", "visits"),
        ("schema.code", "sex"),
        ("schema.code", "ward"),
        ("schema.type", "day"),
    ]
    assert str(error).startswith("8 problems")


def test_too_many_rows(tmp_path: Path) -> None:
    content = rows(*[{} for _ in range(6)])
    error = refused(tmp_path, content, schema_of(max_rows=5))
    assert (error.code, error.field) == ("schema.too-many-rows", "max_rows")
    assert len(read(tmp_path, content, schema_of(max_rows=6))) == 6


def test_limits_are_inclusive(tmp_path: Path) -> None:
    table = read(tmp_path, rows({"weight": "20"}, {"weight": "300"}, {"weight": "20.0"}))
    assert table["weight"].tolist() == [20, 300, 20]


def test_null_values_and_nulls(tmp_path: Path) -> None:
    columns = {
        "a": {"range": [1, 99], "null_values": [0, -9]},
        "b": {"range": [1, 99], "null_values": ["unknown"]},
        "c": {"dtype": "text", "null_values": [9, "NA"]},
        "d": {"dtype": "integer", "range": [0, 9]},
    }
    content = "a,b,c,d\n0,unknown,9,0\n0.00,3,NA,?\n-9.0,4,x,?\n5, ? ,y,9\n"
    table = read(tmp_path, content, schema_of(columns), nulls=("?",))
    assert np.array_equal(table["a"], [np.nan, np.nan, np.nan, 5], equal_nan=True)
    assert np.array_equal(table["b"], [np.nan, 3, 4, np.nan], equal_nan=True)
    assert table["c"].tolist() == [None, None, "x", "y"]
    assert np.array_equal(table["d"], [0, np.nan, np.nan, 9], equal_nan=True)
    assert refused(tmp_path, content, schema_of(columns)).code == "schema.broken"  # "?" is text without nulls


def test_whitespace_around_cells_does_not_matter(tmp_path: Path) -> None:
    table = read(tmp_path, f"{HEADER}\n p1 ,  70.5\t,3 , 1,\tnorth  , 2024-02-29 ,x\n")
    _same(table, read(tmp_path, f"{HEADER}\n{ROW}\n"))


def test_the_dialect_is_not_guessed(tmp_path: Path) -> None:
    """Rows that start with '#' are rows, and apostrophes belong to their cells."""
    schema = schema_of({"t": {"dtype": "text"}, "x": {"range": [0, 9]}})
    table = read(tmp_path, 't,x\n#1,1\n\'a\',2\n"b,""c""\nd",3\n\\,4\n', schema)
    assert table["t"].tolist() == ["#1", "'a'", 'b,"c"\nd', "\\"]
    assert table["x"].tolist() == [1, 2, 3, 4]


def test_rows_keep_the_files_order(tmp_path: Path) -> None:
    """The split into training and held-out rows depends on it."""
    n = 200_000
    schema = schema_of({"i": {"dtype": "integer", "range": [0, n]}})
    table = read(tmp_path, "i\n" + "\n".join(map(str, range(n))), schema)
    assert np.array_equal(table["i"], np.arange(n))


# ---------------------------------------------------------------- round trips

KINDS: dict[str, dict[str, Any]] = {
    "r": {"dtype": "real", "range": [-1.7e308, 1.7e308]},
    "i": {"dtype": "integer", "range": [-(2**53), 2**53]},
    "t": {"dtype": "text"},
    "d": {"dtype": "date"},
}
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\x85"), max_size=8)
CELLS = st.fixed_dictionaries(
    {
        "r": st.none() | st.floats(-1.7e308, 1.7e308),
        "i": st.none() | st.integers(-(2**53), 2**53),
        "t": st.none() | TEXT,
        "d": st.none() | st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)),
    }
)


def _trimmed(text: str | None) -> str | None:
    return (text or "").strip(" \t\n\r\v\f") or None


def _expected(cells: list[dict[str, Any]]) -> Table:
    columns = {
        "r": np.array([math.nan if c["r"] is None else c["r"] for c in cells], np.float64),
        "i": np.array([math.nan if c["i"] is None else c["i"] for c in cells], np.float64),
        "t": np.array([_trimmed(c["t"]) for c in cells], object),
        "d": np.array([c["d"] for c in cells], "datetime64[D]"),
    }
    return Table(schema_of(KINDS), columns)


def _same(one: Table, other: Table) -> None:
    assert list(one.columns) == list(other.columns)
    for name in one.columns:
        a, b = one[name], other[name]
        assert a.dtype == b.dtype
        if a.dtype == np.float64:
            assert a.view(np.int64).tolist() == b.view(np.int64).tolist() or np.array_equal(a, b, equal_nan=True)
            known = ~np.isnan(b)
            assert a[known].tobytes() == b[known].tobytes()  # bit by bit, the sign of zero included
        else:
            assert a.astype(str).tolist() == b.astype(str).tolist()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CELLS, min_size=1, max_size=12))
@example([{"r": -0.0, "i": 2**53, "t": "a,b", "d": None}, {"r": 5e-324, "i": 0, "t": '"', "d": dt.date(2024, 2, 29)}])
@example([{"r": 0.1 + 0.2, "i": -1, "t": "#", "d": None}, {"r": 1.7e308, "i": None, "t": "'x'", "d": None}])
def test_tables_written_as_csv_and_parquet_are_read_back_exactly(tmp_path: Path, cells: list[dict[str, Any]]) -> None:
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(KINDS)
        writer.writerows(["" if c[k] is None else repr(c[k]) if k == "r" else c[k] for k in KINDS] for c in cells)
    arrow = pa.table(
        {
            "r": pa.array([c["r"] for c in cells], pa.float64()),
            "i": pa.array([c["i"] for c in cells], pa.int64()),
            "t": pa.array([c["t"] for c in cells], pa.string()),
            "d": pa.array([c["d"] for c in cells], pa.date32()),
        }
    )
    pq.write_table(arrow, tmp_path / "t.parquet")
    wanted = _expected(cells)
    _same(read_source(SourceSpec(path="t.csv"), wanted.schema, tmp_path), wanted)
    _same(read_source(SourceSpec(path="t.parquet"), wanted.schema, tmp_path), wanted)


def test_parquet_keeps_the_same_contract(tmp_path: Path) -> None:
    columns = {"x": {"range": [0, 9], "null_values": [0]}, "c": {"dtype": "text", "values": ["a"]}}
    good = pa.table({"x": pa.array([1.0, None, 0.0, 4.0]), "c": pa.array(["a", None, "?", " a"])})
    pq.write_table(good, tmp_path / "good.parquet")
    table = read_source(SourceSpec(path="good.parquet", nulls=("?",)), schema_of(columns), tmp_path)
    assert np.array_equal(table["x"], [1, np.nan, np.nan, 4], equal_nan=True)
    assert table["c"].tolist() == ["a", None, None, "a"]
    bad = pa.table({"x": pa.array([1.0, math.inf, 31.977, math.nan]), "c": pa.array(["a", "east31977", "a", "a"])})
    pq.write_table(bad, tmp_path / "bad.parquet")
    with pytest.raises(SchemaError) as caught:
        read_source(SourceSpec(path="bad.parquet"), schema_of(columns), tmp_path)
    assert [(p.code, p.field) for p in caught.value.parts] == [
        ("schema.not-finite", "x"),
        ("schema.range", "x"),
        ("schema.code", "c"),
    ]
    assert "2 of 4 cells are NaN" in str(caught.value)
    _shows_no_cell(caught.value)
    (tmp_path / "not.parquet").write_text(f"{HEADER}\n{CANARY}\n")
    with pytest.raises(SchemaError) as caught:
        read_source(SourceSpec(path="not.parquet"), schema_of(columns), tmp_path)
    assert caught.value.code == "source.unreadable"
    _shows_no_cell(caught.value)


def test_the_real_hospitals_files(atoll_data: Path) -> None:
    """The four heart-disease files keep the example's contract; read again with the csv module alone."""
    from atoll.contract.plan import Plan

    schema = Plan.load(Path(__file__).parents[2] / "examples/heart/plan.yaml").table
    folder = atoll_data / "heart-disease-uci"
    for name, number in {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}.items():
        spec = SourceSpec(path=f"processed.{name}.data", header=False, nulls=("?",))
        table = read_source(spec, schema, folder)
        with (folder / spec.path).open(newline="") as file:
            lines = list(csv.reader(file))
        assert len(table) == len(lines) == number
        for place, column in enumerate(schema.columns):
            if schema.columns[column].role != "ignore":
                nulls = ("?", *(("0",) if column in ("chol", "trestbps") else ()))
                cells = [line[place] for line in lines]
                wanted = [math.nan if c in nulls else float(c) for c in cells]
                assert np.array_equal(table[column], wanted, equal_nan=True), column


def test_a_recipe_that_leaves_nothing_says_what_it_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\nNA\nNA\n")
    schema = schema_of({"x": {"range": [0, 9]}})
    plan = Plan.from_json(
        {"atoll": 1, "name": "t", "schema": schema.model_dump(mode="json"), "program": "statistics.describe",
         "recipe": {"clean": [{"step": "drop_missing", "columns": ["x"]}]}}
    )  # fmt: skip
    with pytest.raises(SchemaError) as caught:
        SiteData.read(SourceSpec(path="t.csv", nulls=("NA",)), plan, tmp_path, "a")
    assert caught.value.code == "schema.nothing-left"
    assert "all 2 rows" in caught.value.message
