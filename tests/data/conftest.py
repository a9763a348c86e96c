"""Reading sources, and a real PostgreSQL server where one is installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from benchmarks.postgres import Database, programs, server

from atoll.contract.errors import SchemaError
from atoll.contract.schema import Column, TableSchema
from atoll.data.check import checked
from atoll.data.engine import Engine
from atoll.data.sources import SourceSpec, known_columns, open_source
from atoll.data.table import Table


@pytest.fixture(scope="session")
def postgres() -> Iterator[Database]:
    """A server of this session's own; its password is in the environment variable PG_PASSWORD_OF_TESTS."""
    if programs() is None:
        pytest.skip("PostgreSQL's server is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="the extra [postgres] is not installed")
    with server() as database, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PG_PASSWORD_OF_TESTS", database.password)
        yield database


Read = Callable[..., Table]
CANARY = "7731977.31"
"""Stands for any cell of a person; must not be seen in an error."""


def spooled_files(folder: Path) -> list[str]:
    """What transcoding left in engines' folders (which may themselves go at any moment)."""
    return [name for _, _, names in os.walk(folder) for name in names if name.startswith("spool-")]


@pytest.fixture
def read_table(tmp_path: Path) -> Read:
    """``read_table(columns, base=folder, **source)``: read, and checked against columns as schemas have them."""

    def read(columns: Mapping[str, Any], base: Path | None = None, /, **source: Any) -> Table:
        schema = TableSchema(name="test", columns={name: Column(**column) for name, column in columns.items()})
        spec = SourceSpec(**source)
        return checked(known_columns(open_source(spec, schema, base or tmp_path, Engine(tmp_path)), spec)).to_table()

    return read


@pytest.fixture
def refused(read_table: Read, tmp_path: Path) -> Callable[..., SchemaError]:
    """``refused(columns, **source)``: the error of reading it, which shows no cell; and no file is left behind."""

    def refuse(columns: Mapping[str, Any], base: Path | None = None, /, **source: Any) -> SchemaError:
        with pytest.raises(SchemaError) as caught:
            read_table(columns, base, **source)
        error: BaseException | None = caught.value
        while error is not None:
            assert CANARY not in f"{error} {error!r}"
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        assert CANARY not in str(caught.value.public())
        assert not spooled_files(tmp_path)
        return caught.value

    return refuse
