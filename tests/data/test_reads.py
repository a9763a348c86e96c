"""Databases are asked for what cleaning reads, and for nothing else."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from atoll.contract.errors import SchemaError
from atoll.contract.plan import Plan, Recipe
from atoll.contract.schema import Column, TableSchema
from atoll.data.engine import Engine
from atoll.data.recipe import Prepared
from atoll.data.site_data import SiteData
from atoll.data.sources import SourceSpec, open_source
from atoll.data.table import Table

SCHEMA = TableSchema(
    name="t", columns={"age": Column(dtype="integer", range=(0, 120)), "born": Column(dtype="text")}
)  # fmt: skip
RENAME = {"step": "rename", "columns": {"age": ["AGE_Y", "years"]}}
COMBINE = {"step": "combine", "into": "born", "template": "{y}-{m}"}
CREATE = "CREATE TABLE people (years {int}, y {text}, m {text}, secret {text}, note {text})"
INSERT = "INSERT INTO people VALUES (30, '1990', '05', 'canary', 'n'), (NULL, '1991', NULL, 'canary', 'n')"


def in_sqlite(tmp_path: Path, _: Any) -> SourceSpec:
    with closing(sqlite3.connect(tmp_path / "t.sqlite")) as file, file:
        file.execute(CREATE.format(int="INTEGER", text="TEXT"))
        file.execute(INSERT)
    return SourceSpec(path="t.sqlite", table="people")


def in_postgresql(_: Path, request: Any) -> SourceSpec:
    postgres = request.getfixturevalue("postgres")
    postgres.execute("DROP TABLE IF EXISTS people")
    postgres.execute(CREATE.format(int="int", text="text"))
    postgres.execute(INSERT)
    return SourceSpec(url=postgres.url, table="people", password_env="PG_PASSWORD_OF_TESTS")


@pytest.fixture(params=[in_sqlite, in_postgresql], ids=["sqlite", "postgresql"])
def people(request: Any, tmp_path: Path) -> SourceSpec:
    make: Callable[[Path, Any], SourceSpec] = request.param
    return make(tmp_path, request)


def fetched(spec: SourceSpec, folder: Path, *clean: Any) -> set[str]:
    reads = Prepared(Recipe(clean=clean)).reads()
    return {*open_source(spec, SCHEMA, folder, Engine(folder), reads).table.columns} - {"__row"}


def read(spec: SourceSpec, folder: Path, *clean: Any) -> Table:
    plan = Plan(
        name="reads", table=SCHEMA, program="statistics.describe", params={"columns": ["age"]},
        recipe=Recipe(clean=clean), protection="plain",
    )  # fmt: skip
    return SiteData.read(spec, plan, folder, "site").base()


def test_aliases_and_parts_are_read_from_a_database(people: SourceSpec, tmp_path: Path) -> None:
    table = read(people, tmp_path, RENAME, COMBINE)
    assert list(table.columns) == ["age", "born"]
    assert table["age"].tolist()[:1] == [30]
    assert table["born"].tolist() == ["1990-05", None]
    assert fetched(people, tmp_path, RENAME, COMBINE) == {"years", "y", "m"}
    assert fetched(people, tmp_path, RENAME) == {"years"}


def test_loose_names_are_looked_for_among_all(people: SourceSpec, tmp_path: Path) -> None:
    loose = {**RENAME, "match": "loose", "columns": {"age": ["Years"]}}
    assert fetched(people, tmp_path, loose, COMBINE) == {"years", "y", "m", "secret", "note"}
    assert read(people, tmp_path, loose, COMBINE)["age"].tolist()[:1] == [30]


def test_the_sites_own_names_come_first(people: SourceSpec, tmp_path: Path) -> None:
    spec = people.model_copy(update={"columns": {"AGE_Y": "years", "month": "m"}})
    combine = {**COMBINE, "template": "{y}-{month}"}
    assert fetched(spec, tmp_path, RENAME, combine) == {"AGE_Y", "y", "month"}
    assert read(spec, tmp_path, RENAME, combine)["born"].tolist() == ["1990-05", None]


def test_the_contract_is_checked_as_before(people: SourceSpec, tmp_path: Path) -> None:
    with pytest.raises(SchemaError) as caught:
        read(people, tmp_path, RENAME)
    assert [(part.code, part.field) for part in caught.value.parts or [caught.value]] == [
        ("schema.missing-column", "born")
    ]
    strict = people.model_copy(update={"extra": "refuse"})
    assert list(read(strict, tmp_path, RENAME, COMBINE).columns) == ["age", "born"]
    loose = {**RENAME, "match": "loose"}
    with pytest.raises(SchemaError) as caught:
        read(strict, tmp_path, loose, COMBINE)
    assert {part.code for part in caught.value.parts or [caught.value]} == {"schema.extra-column"}
    assert "canary" not in str(caught.value)
