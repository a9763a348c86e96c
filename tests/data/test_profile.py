"""Drafted schemas: they load, their table keeps them, and no single person's cell is in them."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from atoll.cli.main import app
from atoll.contract.errors import SchemaError
from atoll.contract.schema import TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.profile import _outwards, draft
from atoll.data.sources import SourceSpec, known_columns, open_cells, open_source


def profiled(base: Path, **source: Any) -> tuple[str, TableSchema]:
    """A table's draft, after its table kept it."""
    spec, engine = SourceSpec(**source), Engine()
    text = draft(open_cells(spec, None, base, engine), engine, "test")
    schema = TableSchema.model_validate(yaml.safe_load(text))
    checked(known_columns(open_source(spec, schema, base, Engine()), spec))
    return text, schema


def written(folder: Path, columns: dict[str, list[Any]]) -> str:
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / "t.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "t.csv"


REAL = [
    ("heart-disease-uci/processed.cleveland.data", {"header": False}),
    ("heart-disease-uci/processed.hungarian.data", {"header": False}),
    ("heart-disease-uci/processed.switzerland.data", {"header": False}),
    ("heart-disease-uci/processed.va.data", {"header": False}),
    ("default-credit-uci/UCI_Credit_Card.csv.gz", {}),
    ("epi-linelists/h7n9_china_2013.csv", {}),
    ("beijing-air-quality/PRSA_Data_Changping_20130301-20170228.csv.gz", {}),
]


@pytest.mark.parametrize(("path", "options"), REAL, ids=[Path(path).stem for path, _ in REAL])
def test_real_tables_keep_their_own_draft(atoll_data: Path, path: str, options: dict[str, Any]) -> None:
    _, schema = profiled(atoll_data, path=path, **options)
    assert all(column.unit == "" for column in schema.columns.values())


def test_the_credit_tables_columns(atoll_data: Path) -> None:
    _, schema = profiled(atoll_data, path="default-credit-uci/UCI_Credit_Card.csv.gz")
    columns = schema.columns
    assert columns["ID"].role == "entity"
    assert columns["SEX"].values == (1, 2)
    assert columns["LIMIT_BAL"].range == (0, 1_100_000)
    assert columns["AGE"].range == (10, 90)  # 21 to 79 in the data


def test_kinds_of_columns(tmp_path: Path) -> None:
    n = 60
    day = [dt.date(2024, 1, 1) + dt.timedelta(days=i) for i in range(n)]
    text, schema = profiled(
        tmp_path,
        path=written(
            tmp_path,
            {
                "patient_id": [f"p{i}" for i in range(n)],
                "when": day,
                "hour": [f"{d} {i % 24:02}:00:00" for i, d in enumerate(day)],
                "slashes": [d.strftime("%d/%m/%Y") for d in day],
                "amount": [f'"{i},{i + 100:03}.5"' for i in range(1, n + 1)],
                "dose": [9999 if i % 6 == 0 else i / 7 for i in range(n)],
                "sex": ["m" if i % 2 else "NA" for i in range(n)],
                "temp": ["n/a" if i % 10 == 0 else 36 + i / 40 for i in range(n)],
                "ward": ["north", *["south"] * (n - 1)],
                "free": [f"text of person {i} {i * 37}" for i in range(n)],
                "same": [7] * n,
                "gone": [""] * n,
                "label": [i % 2 for i in range(n)],
                "code": [99 if i % 6 == 0 else i % 3 for i in range(n)],
            },
        ),
    )
    columns = schema.columns
    assert (columns["patient_id"].dtype, columns["patient_id"].role) == ("text", "entity")
    assert (columns["when"].dtype, columns["when"].role) == ("date", "time")
    assert (columns["hour"].dtype, columns["hour"].grain, columns["hour"].role) == ("datetime", "1h", "feature")
    assert columns["slashes"].dtype == columns["amount"].dtype == "text"
    assert "%d/%m/%Y" in text
    assert "thousands separators" in text
    assert columns["dose"].range is not None and columns["dose"].range[1] > 9999
    assert "null_values: [9999]" in text
    assert columns["sex"].values == ("NA", "m")
    assert (columns["temp"].dtype, columns["temp"].null_values) == ("real", ("n/a",))
    assert columns["ward"].values is None
    assert "north" not in text  # one person's
    assert (columns["free"].role, columns["gone"].role) == ("ignore", "ignore")
    assert columns["same"].values == (7,)
    assert (columns["label"].role, columns["label"].values) == ("label", (0, 1))
    assert "Does 99 mean missing?" in text
    assert columns["when"].missing == "forbid"
    assert schema.max_rows >= n


def test_duplicates_encodings_and_future_dates(tmp_path: Path) -> None:
    later = (dt.date.today() + dt.timedelta(days=30)).isoformat()
    (tmp_path / "t.txt").write_bytes(("日期;值\n" + f"{later};1\n" * 20 + f"{later};2\n" * 8).encode("gbk"))
    text, schema = profiled(tmp_path, path="t.txt", separator=";", encoding="gbk")
    assert "26 of 28 rows repeat another row" in text
    assert (schema.columns["日期"].dtype, schema.columns["日期"].role) == ("date", "feature")


def test_typed_tables(tmp_path: Path) -> None:
    n = 40
    table = pa.table(
        {
            "i": pa.array(range(n)), "b": pa.array([i % 2 == 0 for i in range(n)]),
            "at": pa.array([dt.datetime(2024, 1, 1, i % 24, tzinfo=dt.UTC) for i in range(n)]),
            "d": pa.array([None, *[dt.date(2024, 1, 1)] * (n - 1)]), "l": pa.array([[1]] * n),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    _, schema = profiled(tmp_path, path="t.parquet")
    kinds = {name: column.dtype for name, column in schema.columns.items()}
    assert kinds == {"i": "integer", "b": "integer", "at": "datetime", "d": "date", "l": "text"}
    assert schema.columns["b"].values == (0, 1)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(SchemaError) as caught:
        profiled(tmp_path, path="t.csv")
    assert caught.value.code == "source.empty"


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.booleans())
def test_ranges_hold_the_data_with_room(a: float, b: float, whole: bool) -> None:
    low, high = sorted((float(np.floor(a)), float(np.floor(b))) if whole else (a, b))
    lowest, highest = _outwards(low, high, whole=whole)
    assert lowest <= low <= high <= highest
    assert lowest < highest
    assert lowest < highest
    span = (high - low) or abs(high) or 1.0
    assert highest - lowest <= 1.5 * span + abs(high) * (high == low) + 4 * whole


def test_the_command(tmp_path: Path) -> None:
    written(tmp_path, {"a": list(range(20)), "b": ["x", "y"] * 10})
    (tmp_path / "source.yaml").write_text("{path: t.csv}")
    first = CliRunner().invoke(app, ["profile", str(tmp_path / "t.csv"), "--name", "mine"])
    assert first.exit_code == 0, first.output
    made = [
        "profile",
        "--source",
        str(tmp_path / "source.yaml"),
        "--out",
        str(tmp_path / "schema.yaml"),
        "--name",
        "mine",
    ]
    assert CliRunner().invoke(app, made).exit_code == 0
    assert (tmp_path / "schema.yaml").read_text() == first.stdout
    assert yaml.safe_load(first.stdout)["name"] == "mine"
    assert CliRunner().invoke(app, ["profile"]).exception is not None
